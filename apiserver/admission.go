package apiserver

import (
	"context"
	"fmt"

	"go.opentelemetry.io/otel/trace/noop"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/admission/initializer"
	admissionmetrics "k8s.io/apiserver/pkg/admission/metrics"
	apiserverapi "k8s.io/apiserver/pkg/apis/apiserver"
	apiserverapiv1 "k8s.io/apiserver/pkg/apis/apiserver/v1"
	"k8s.io/apiserver/pkg/authorization/authorizer"
	genericapiserver "k8s.io/apiserver/pkg/server"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	"k8s.io/apiserver/pkg/util/webhook"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	controlplaneadmission "k8s.io/kubernetes/pkg/controlplane/apiserver/admission"
	kubeadmission "k8s.io/kubernetes/pkg/kubeapiserver/admission"
	kubeoptions "k8s.io/kubernetes/pkg/kubeapiserver/options"
)

// newAdmission builds upstream's default admission plugins in upstream's order.
func newAdmission(ctx context.Context, c *Config, client kubernetes.Interface, authz authorizer.Authorizer, mapper meta.RESTMapper,
	services webhook.ServiceResolver) (admission.Interface, error) {
	plugins := admission.NewPlugins()
	genericapiserver.RegisterAllAdmissionPlugins(plugins)
	kubeoptions.RegisterAllAdmissionPlugins(plugins)
	off := kubeoptions.DefaultOffAdmissionPlugins()
	var names []string
	for _, name := range kubeoptions.AllOrderedPlugins {
		if !off.Has(name) {
			names = append(names, name)
		}
	}
	scheme, err := admissionConfigScheme()
	if err != nil {
		return nil, err
	}
	configs, err := admission.ReadAdmissionConfiguration(names, "", scheme)
	if err != nil {
		return nil, err
	}
	chain, err := initializers(ctx, c, client, authz, mapper, services)
	if err != nil {
		return nil, err
	}
	out, err := plugins.NewFromPlugins(names, configs, chain, admission.Decorators{admission.DecoratorFunc(admissionmetrics.WithControllerMetrics)})
	if err != nil {
		return nil, fmt.Errorf("make the admission plugins: %w", err)
	}
	return admissionmetrics.WithStepMetrics(out), nil
}

func admissionConfigScheme() (*runtime.Scheme, error) {
	scheme := runtime.NewScheme()
	if err := apiserverapi.AddToScheme(scheme); err != nil {
		return nil, err
	}
	return scheme, apiserverapiv1.AddToScheme(scheme)
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
