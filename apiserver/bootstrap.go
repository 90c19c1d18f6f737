package apiserver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"time"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/wait"
	flowcontrolbootstrap "k8s.io/apiserver/pkg/apis/flowcontrol/bootstrap"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/util/retry"
	"k8s.io/component-helpers/auth/rbac/reconciliation"
	schedulingv1 "k8s.io/kubernetes/pkg/apis/scheduling/v1"
	"k8s.io/kubernetes/pkg/controlplane/controller/kubernetesservice"
	"k8s.io/kubernetes/pkg/controlplane/controller/legacytokentracking"
	"k8s.io/kubernetes/pkg/controlplane/reconcilers"
	"k8s.io/kubernetes/plugin/pkg/auth/authorizer/rbac/bootstrappolicy"
)

// bootstrapWriters bounds the bootstrap writes under way at once: enough that a commit of the store serves many.
const bootstrapWriters = 32

// bootstrap makes what must exist before clients come: system namespaces, the default service range, the `kubernetes` service,
// RBAC's default policy, priority classes, flow-control objects and the trust data for aggregated servers. It is what
// upstream's server does in post-start hooks, run once and concurrently; everything is left as it is where it exists,
// except for the RBAC policy, whose missing rules are put back as upstream does.
type bootstrap struct {
	config *Config
	client kubernetes.Interface
	hooks  *hooks
	// service keeps the kubernetes service; set by services.
	service *kubernetesservice.Controller
}

// Times of a server's lease among those of one store, upstream's: it is renewed every serverLeaseInterval, and a server whose lease
// has not been renewed for serverLeaseTTL is no longer an endpoint of the kubernetes service.
const (
	serverLeaseInterval = 10 * time.Second
	serverLeaseTTL      = 15 * time.Second
)

func (b *bootstrap) run(ctx context.Context) error {
	if err := b.namespaces(ctx); err != nil {
		return fmt.Errorf("create the system namespaces: %w", err)
	}
	b.hooks.done(hookNamespaces)
	g, ctx := errgroup.WithContext(ctx)
	for _, step := range []struct {
		name, hook string
		run        func(context.Context) error
	}{
		{"service range and the kubernetes service", hookServices, b.services},
		{"default RBAC policy", hookPolicy, b.policy},
		{"system priority classes", hookPriorities, b.priorityClasses},
		{"flow control objects", hookFlowObjects, b.flowControl},
		{"authentication data for other servers", hookTrust, b.trust},
		{"record of legacy token tracking", hookTokenTracking, b.tokenTracking},
	} {
		g.Go(func() error {
			if err := step.run(ctx); err != nil {
				return fmt.Errorf("bootstrap the %s: %w", step.name, err)
			}
			b.hooks.done(step.hook)
			return nil
		})
	}
	return g.Wait()
}

// ignoreExisting makes the creation of something that is there already a success.
func ignoreExisting[T any](_ T, err error) error {
	if apierrors.IsAlreadyExists(err) {
		return nil
	}
	return err
}

func (b *bootstrap) namespaces(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	for _, name := range []string{metav1.NamespaceSystem, metav1.NamespacePublic, corev1.NamespaceNodeLease, metav1.NamespaceDefault} {
		g.Go(func() error {
			if _, err := b.config.Informers.Core().V1().Namespaces().Lister().Get(name); err == nil {
				return nil
			}
			return ignoreExisting(b.client.CoreV1().Namespaces().Create(ctx, &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}))
		})
	}
	return g.Wait()
}

// services makes the default ServiceCIDR ready, then the service through which pods reach this server.
func (b *bootstrap) services(ctx context.Context) error {
	if err := b.serviceCIDR(ctx); err != nil {
		return err
	}
	first := append(net.IP(nil), b.config.ServiceCIDR.IP.To4()...)
	first[len(first)-1]++
	endpoints, err := b.endpoints()
	if err != nil {
		return err
	}
	b.service = kubernetesservice.New(kubernetesservice.Config{
		PublicIP:           b.config.AdvertiseAddress,
		EndpointReconciler: endpoints,
		EndpointInterval:   serverLeaseInterval,
		ServiceIP:          first,
		ServicePort:        443,
		PublicServicePort:  b.config.Port,
	}, b.client, b.config.Informers.Core().V1().Services())
	// The address allocator learns of the range by its informer and says to nobody when it has.
	return retry.OnError(allocatorBackoff(), func(error) bool { return ctx.Err() == nil }, func() error {
		if err := b.service.UpdateKubernetesService(true); err != nil {
			return err
		}
		return b.dns(ctx)
	})
}

// endpoints keeps the endpoints of the kubernetes service: this server alone, or all that share the store and live.
func (b *bootstrap) endpoints() (reconcilers.EndpointReconciler, error) {
	adapter := reconcilers.NewEndpointsAdapter(b.client.CoreV1(), b.client.DiscoveryV1())
	if !b.config.Registry.Shared() {
		return reconcilers.NewMasterCountEndpointReconciler(1, adapter), nil
	}
	leases, err := b.config.Registry.MasterLeases(serverLeaseTTL)
	return reconcilers.NewLeaseEndpointReconciler(adapter, leases), err
}

// keepEndpoints renews this server's place among the endpoints until ctx ends, then gives it up.
func (b *bootstrap) keepEndpoints(ctx context.Context) {
	b.service.Run(ctx.Done())
	b.service.Stop()
}

// allocatorBackoff bounds the wait for the service address allocator: about ten seconds, in ever longer steps.
func allocatorBackoff() wait.Backoff {
	return wait.Backoff{Duration: 2 * time.Millisecond, Factor: 2, Steps: 13}
}

func (b *bootstrap) serviceCIDR(ctx context.Context) error {
	const name = "kubernetes"
	cidrs := b.client.NetworkingV1().ServiceCIDRs()
	return retry.RetryOnConflict(retry.DefaultRetry, func() error {
		cidr, err := cidrs.Get(ctx, name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			cidr, err = cidrs.Create(ctx, &networkingv1.ServiceCIDR{
				ObjectMeta: metav1.ObjectMeta{Name: name},
				Spec:       networkingv1.ServiceCIDRSpec{CIDRs: []string{b.config.ServiceCIDR.String()}},
			}, metav1.CreateOptions{})
		}
		if err != nil || meta.FindStatusCondition(cidr.Status.Conditions, networkingv1.ServiceCIDRConditionReady) != nil {
			return err
		}
		meta.SetStatusCondition(&cidr.Status.Conditions, metav1.Condition{
			Type:    networkingv1.ServiceCIDRConditionReady,
			Status:  metav1.ConditionTrue,
			Reason:  "",
			Message: "Kubernetes default Service CIDR is ready",
		})
		_, err = cidrs.UpdateStatus(ctx, cidr, metav1.UpdateOptions{})
		return err
	})
}

// policy writes upstream's default RBAC roles and bindings; existing ones get their missing rules back unless they
// opt out of reconciliation by annotation.
func (b *bootstrap) policy(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(bootstrapWriters)
	roles := append(bootstrappolicy.ClusterRoles(), bootstrappolicy.ControllerRoles()...)
	roles = append(roles, nodeNetworkRole())
	for i := range roles {
		g.Go(func() error { return b.role(ctx, reconciliation.ClusterRoleRuleOwner{ClusterRole: &roles[i]}) })
	}
	bindings := append(bootstrappolicy.ClusterRoleBindings(), bootstrappolicy.ControllerRoleBindings()...)
	bindings = append(bindings, nodeNetworkBinding())
	for i := range bindings {
		g.Go(func() error {
			return b.binding(ctx, reconciliation.ClusterRoleBindingAdapter{ClusterRoleBinding: &bindings[i]})
		})
	}
	for _, list := range bootstrappolicy.NamespaceRoles() {
		for i := range list {
			g.Go(func() error { return b.role(ctx, reconciliation.RoleRuleOwner{Role: &list[i]}) })
		}
	}
	for _, list := range bootstrappolicy.NamespaceRoleBindings() {
		for i := range list {
			g.Go(func() error { return b.binding(ctx, reconciliation.RoleBindingAdapter{RoleBinding: &list[i]}) })
		}
	}
	return g.Wait()
}

// nodeNetworkName names the role by which agents, which are service proxy and DNS server too, see what these need.
const nodeNetworkName = "knarr:node-network"

func nodeNetworkRole() rbacv1.ClusterRole {
	read := []string{"get", "list", "watch"}
	return rbacv1.ClusterRole{
		ObjectMeta: metav1.ObjectMeta{Name: nodeNetworkName, Labels: map[string]string{"kubernetes.io/bootstrapping": "rbac-defaults"}},
		Rules: []rbacv1.PolicyRule{
			{APIGroups: []string{""}, Resources: []string{"services", "nodes", "namespaces"}, Verbs: read},
			{APIGroups: []string{"discovery.k8s.io"}, Resources: []string{"endpointslices"}, Verbs: read},
			{APIGroups: []string{"networking.k8s.io"}, Resources: []string{"servicecidrs", "networkpolicies"}, Verbs: read},
		},
	}
}

func nodeNetworkBinding() rbacv1.ClusterRoleBinding {
	return rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: nodeNetworkName, Labels: map[string]string{"kubernetes.io/bootstrapping": "rbac-defaults"}},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: nodeNetworkName},
		Subjects:   []rbacv1.Subject{{APIGroup: rbacv1.GroupName, Kind: rbacv1.GroupKind, Name: user.NodesGroup}},
	}
}

func (b *bootstrap) role(ctx context.Context, role reconciliation.RuleOwner) error {
	if isNew, err := b.createRole(ctx, role); isNew || err != nil {
		return err
	}
	opts := reconciliation.ReconcileRoleOptions{Role: role, Confirm: !protects(role.GetAnnotations())}
	switch role.(type) {
	case reconciliation.ClusterRoleRuleOwner:
		opts.Client = reconciliation.ClusterRoleModifier{Client: b.client.RbacV1().ClusterRoles()}
	default:
		opts.Client = reconciliation.RoleModifier{Client: b.client.RbacV1(), NamespaceClient: b.client.CoreV1().Namespaces()}
	}
	return retry.RetryOnConflict(retry.DefaultRetry, func() error {
		_, err := opts.Run()
		return err
	})
}

// createRole saves the look-up of a role that the informers know to be absent.
func (b *bootstrap) createRole(ctx context.Context, role reconciliation.RuleOwner) (created bool, err error) {
	i := b.config.Informers.Rbac().V1()
	switch r := role.(type) {
	case reconciliation.ClusterRoleRuleOwner:
		if _, err := i.ClusterRoles().Lister().Get(r.ClusterRole.Name); !apierrors.IsNotFound(err) {
			return false, err
		}
		_, err = b.client.RbacV1().ClusterRoles().Create(ctx, r.ClusterRole, metav1.CreateOptions{})
	case reconciliation.RoleRuleOwner:
		if _, err := i.Roles().Lister().Roles(r.Role.Namespace).Get(r.Role.Name); !apierrors.IsNotFound(err) {
			return false, err
		}
		_, err = b.client.RbacV1().Roles(r.Role.Namespace).Create(ctx, r.Role, metav1.CreateOptions{})
	}
	if apierrors.IsAlreadyExists(err) {
		return false, nil
	}
	return err == nil, err
}

func (b *bootstrap) binding(ctx context.Context, binding reconciliation.RoleBinding) error {
	if isNew, err := b.createBinding(ctx, binding); isNew || err != nil {
		return err
	}
	opts := reconciliation.ReconcileRoleBindingOptions{RoleBinding: binding, Confirm: !protects(binding.GetAnnotations())}
	switch binding.(type) {
	case reconciliation.ClusterRoleBindingAdapter:
		opts.Client = reconciliation.ClusterRoleBindingClientAdapter{Client: b.client.RbacV1().ClusterRoleBindings()}
	default:
		opts.Client = reconciliation.RoleBindingClientAdapter{Client: b.client.RbacV1(), NamespaceClient: b.client.CoreV1().Namespaces()}
	}
	return retry.RetryOnConflict(retry.DefaultRetry, func() error {
		_, err := opts.Run()
		return err
	})
}

func (b *bootstrap) createBinding(ctx context.Context, binding reconciliation.RoleBinding) (created bool, err error) {
	i := b.config.Informers.Rbac().V1()
	switch r := binding.(type) {
	case reconciliation.ClusterRoleBindingAdapter:
		if _, err := i.ClusterRoleBindings().Lister().Get(r.ClusterRoleBinding.Name); !apierrors.IsNotFound(err) {
			return false, err
		}
		_, err = b.client.RbacV1().ClusterRoleBindings().Create(ctx, r.ClusterRoleBinding, metav1.CreateOptions{})
	case reconciliation.RoleBindingAdapter:
		if _, err := i.RoleBindings().Lister().RoleBindings(r.RoleBinding.Namespace).Get(r.RoleBinding.Name); !apierrors.IsNotFound(err) {
			return false, err
		}
		_, err = b.client.RbacV1().RoleBindings(r.RoleBinding.Namespace).Create(ctx, r.RoleBinding, metav1.CreateOptions{})
	}
	if apierrors.IsAlreadyExists(err) {
		return false, nil
	}
	return err == nil, err
}

// protects reports that an object's owner does not want it reconciled.
func protects(annotations map[string]string) bool {
	return annotations[rbacv1.AutoUpdateAnnotationKey] == "false"
}

func (b *bootstrap) priorityClasses(ctx context.Context) error {
	var errs []error
	for _, class := range schedulingv1.SystemPriorityClasses() {
		errs = append(errs, ignoreExisting(b.client.SchedulingV1().PriorityClasses().Create(ctx, class, metav1.CreateOptions{})))
	}
	return errors.Join(errs...)
}

func (b *bootstrap) flowControl(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(bootstrapWriters)
	for _, level := range append(flowcontrolbootstrap.MandatoryPriorityLevelConfigurations, flowcontrolbootstrap.SuggestedPriorityLevelConfigurations...) {
		g.Go(func() error {
			return ignoreExisting(b.client.FlowcontrolV1().PriorityLevelConfigurations().Create(ctx, level.DeepCopy(), metav1.CreateOptions{}))
		})
	}
	for _, schema := range append(flowcontrolbootstrap.MandatoryFlowSchemas, flowcontrolbootstrap.SuggestedFlowSchemas...) {
		g.Go(func() error {
			return ignoreExisting(b.client.FlowcontrolV1().FlowSchemas().Create(ctx, schema.DeepCopy(), metav1.CreateOptions{}))
		})
	}
	return g.Wait()
}

// trust publishes how an aggregated API server recognises this one and its users.
func (b *bootstrap) trust(ctx context.Context) error {
	list := func(s ...string) string {
		data, _ := json.Marshal(s)
		return string(data)
	}
	want := map[string]string{
		"client-ca-file":                     string(b.config.ClientCA),
		"requestheader-client-ca-file":       string(b.config.RequestHeaderCA),
		"requestheader-username-headers":     list("X-Remote-User"),
		"requestheader-uid-headers":          list("X-Remote-Uid"),
		"requestheader-group-headers":        list("X-Remote-Group"),
		"requestheader-extra-headers-prefix": list("X-Remote-Extra-"),
		"requestheader-allowed-names":        list(b.config.ProxyClientName),
	}
	const name = "extension-apiserver-authentication"
	maps := b.client.CoreV1().ConfigMaps(metav1.NamespaceSystem)
	return retry.RetryOnConflict(retry.DefaultRetry, func() error {
		existing, err := maps.Get(ctx, name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			_, err = maps.Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}, Data: want}, metav1.CreateOptions{})
			return err
		}
		if err != nil {
			return err
		}
		changed := false
		for key, value := range want {
			if existing.Data[key] != value {
				if existing.Data == nil {
					existing.Data = map[string]string{}
				}
				existing.Data[key], changed = value, true
			}
		}
		if !changed {
			return nil
		}
		_, err = maps.Update(ctx, existing, metav1.UpdateOptions{})
		return err
	})
}

// tokenTracking records since when uses of legacy tokens are noted, which upstream's token cleaner asks for.
func (b *bootstrap) tokenTracking(ctx context.Context) error {
	return ignoreExisting(b.client.CoreV1().ConfigMaps(metav1.NamespaceSystem).Create(ctx, &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: legacytokentracking.ConfigMapName},
		Data:       map[string]string{legacytokentracking.ConfigMapDataKey: time.Now().UTC().Format(time.DateOnly)},
	}, metav1.CreateOptions{}))
}

// dns makes the service under whose address every node answers DNS queries itself; it needs no endpoints.
func (b *bootstrap) dns(ctx context.Context) error {
	const name = "kube-dns"
	if _, err := b.client.CoreV1().Services(metav1.NamespaceSystem).Get(ctx, name, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		return err
	}
	port := func(name string, protocol corev1.Protocol, number int32) corev1.ServicePort {
		return corev1.ServicePort{Name: name, Protocol: protocol, Port: number, TargetPort: intstr.FromInt32(number)}
	}
	service := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{
			Name:   name,
			Labels: map[string]string{"k8s-app": "kube-dns", "kubernetes.io/cluster-service": "true", "kubernetes.io/name": "CoreDNS"},
		},
		Spec: corev1.ServiceSpec{
			ClusterIP: b.config.ClusterDNS.String(),
			Ports:     []corev1.ServicePort{port("dns", corev1.ProtocolUDP, 53), port("dns-tcp", corev1.ProtocolTCP, 53)},
		},
	}
	return ignoreExisting(b.client.CoreV1().Services(metav1.NamespaceSystem).Create(ctx, service, metav1.CreateOptions{}))
}
