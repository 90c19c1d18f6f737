package apiserver

import (
	"context"
	"fmt"

	"go.opentelemetry.io/otel/trace/noop"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/admission/initializer"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	"k8s.io/apiserver/pkg/util/webhook"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	controlplaneadmission "k8s.io/kubernetes/pkg/controlplane/apiserver/admission"
	kubeadmission "k8s.io/kubernetes/pkg/kubeapiserver/admission"
)

// newAdmission builds the admission plugins that the options ask for, in upstream's order.
func newAdmission(ctx context.Context, c *Config, client kubernetes.Interface, authz authorizer.Authorizer, mapper meta.RESTMapper,
	services webhook.ServiceResolver) (*plugins, error) {
	o := c.options()
	configs, err := o.AdmissionConfig()
	if err != nil {
		return nil, fmt.Errorf("admission: %w", err)
	}
	chain, err := initializers(ctx, c, client, authz, mapper, services)
	if err != nil {
		return nil, err
	}
	out := newPlugins(findAdmissionVectors())
	for _, name := range o.AdmissionPlugins() {
		config, err := configs.ConfigFor(name)
		if err != nil {
			return nil, fmt.Errorf("configuration of admission plugin %s: %w", name, err)
		}
		var plugin admission.Interface
		var idle func(admission.Attributes) bool
		if config == nil { // one that is configured may do more
			idle = idleness{c.Registry}.of(name)
			plugin, err = newPolicyPlugin(name, chain, func() { c.Informers.Start(ctx.Done()) })
		}
		if plugin == nil && err == nil {
			plugin, err = o.Admission.GenericAdmission.Plugins.InitPlugin(name, config, chain)
		}
		if err != nil {
			return nil, fmt.Errorf("make the admission plugins: %w", err)
		}
		out.add(name, plugin, idle)
	}
	return out, nil
}

// initializers hand the plugins what they ask for.
func initializers(ctx context.Context, c *Config, client kubernetes.Interface, authz authorizer.Authorizer, mapper meta.RESTMapper,
	services webhook.ServiceResolver) (admission.PluginInitializers, error) {
	dynamicClient, err := dynamic.NewForConfig(c.Loopback)
	if err != nil {
		return nil, err
	}
	config := controlplaneadmission.Config{
		LoopbackClientConfig: c.Loopback,
		ExternalInformers:    c.Informers,
		APIResourceConfig:    c.Registry.Resources(),
	}
	specific, err := config.New(c.ProxyTransport, nil, services, noop.NewTracerProvider())
	if err != nil {
		return nil, err
	}
	chain := admission.PluginInitializers{
		initializer.NewAPIServerIDInitializer(serverID),
		initializer.New(client, dynamicClient, c.Informers, authz, utilfeature.DefaultFeatureGate,
			effectiveVersion(), ctx.Done(), mapper),
	}
	chain = append(chain, specific...)
	return append(chain, kubeadmission.NewPluginInitializer()), nil
}
