package apiserver

import (
	"context"
	"errors"
	"net/http"
	"sync/atomic"
	"time"

	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/server/healthz"
	"k8s.io/apiserver/pkg/server/mux"
	"k8s.io/component-base/metrics/prometheus/slis"
	"k8s.io/klog/v2"
)

// storeCheckTimeout bounds one look at the store, as upstream's etcd-healthcheck-timeout.
const storeCheckTimeout = 2 * time.Second

// Names of what a starting server does, as upstream's post-start hooks that do the same: monitoring knows them.
const (
	hookInformers       = "generic-apiserver-start-informers"
	hookFlowControl     = "priority-and-fairness-config-consumer"
	hookFlowObjects     = "priority-and-fairness-config-producer"
	hookFilter          = "priority-and-fairness-filter"
	hookNamespaces      = "start-system-namespaces-controller"
	hookServices        = "bootstrap-controller"
	hookPolicy          = "rbac/bootstrap-roles"
	hookPriorities      = "scheduling/bootstrap-system-priority-classes"
	hookTrust           = "start-cluster-authentication-info-controller"
	hookTokenTracking   = "start-legacy-token-tracking-controller"
	hookRepair          = "start-service-ip-repair-controllers"
	hookCustomInformers = "start-apiextensions-informers"
	hookCustom          = "start-apiextensions-controllers"
	hookCustomSynced    = "crd-informer-synced"
	hookAggregator      = "start-kube-aggregator-informers"
	hookAvailability    = "apiservice-status-remote-available-controller"
	hookRegistration    = "apiservice-registration-controller"
	hookDiscovery       = "apiservice-discovery-controller"
	hookRegistered      = "kube-apiserver-autoregistration"
	hookComplete        = "autoregister-completion"
)

// hookNames lists the hooks in the order in which the checks show them.
func hookNames() []string {
	return []string{
		hookInformers, hookFlowControl, hookFilter, hookCustomInformers, hookCustom, hookCustomSynced, hookRepair, hookPolicy, hookNamespaces,
		hookServices, hookTrust, hookTokenTracking, hookPriorities, hookFlowObjects, hookAggregator, hookAvailability, hookRegistration, hookDiscovery,
		hookRegistered, hookComplete,
	}
}

// hooks remembers which steps of the start are done. Safe for concurrent use.
type hooks struct{ finished map[string]*atomic.Bool }

func newHooks() *hooks {
	h := &hooks{finished: map[string]*atomic.Bool{}}
	for _, name := range hookNames() {
		h.finished[name] = &atomic.Bool{}
	}
	return h
}

// done marks steps as finished.
func (h *hooks) done(names ...string) {
	for _, name := range names {
		h.finished[name].Store(true)
	}
}

// checks gives one health check per step.
func (h *hooks) checks() []healthz.HealthChecker {
	var out []healthz.HealthChecker
	for _, name := range hookNames() {
		finished := h.finished[name]
		out = append(out, healthz.NamedCheck("poststarthook/"+name, func(*http.Request) error {
			if !finished.Load() {
				return errors.New("not finished")
			}
			return nil
		}))
	}
	return out
}

// installHealth serves /healthz, /livez and /readyz, each check also by itself, under upstream's names.
func (s *Server) installHealth(m *mux.PathRecorderMux) {
	logging := healthz.NamedCheck("log", func(*http.Request) error {
		klog.Flush()
		return nil
	})
	alive := []healthz.HealthChecker{healthz.PingHealthz, logging, healthz.NamedCheck("etcd", s.checkStore)}
	alive = append(alive, s.hooks.checks()...)
	ready := []healthz.HealthChecker{healthz.NamedCheck("etcd-readiness", s.checkStore), healthz.NewInformerSyncHealthz(s.config.Informers)}
	stopping := healthz.NamedCheck("shutdown", func(*http.Request) error {
		if s.stopping.Load() {
			return errors.New("process is shutting down")
		}
		return nil
	})
	healthz.InstallHandler(m, alive...)
	healthz.InstallLivezHandler(m, alive...)
	healthz.InstallReadyzHandler(m, append(append(alive, ready...), stopping)...)
	slis.SLIMetricsWithReset{}.Install(m)
}

// checkStore tells whether objects can be read, and whatever else the config's check knows.
func (s *Server) checkStore(req *http.Request) error {
	if s.config.Registry.Kind(schema.GroupResource{Resource: "namespaces"}) == nil {
		return errors.New("the store has no namespaces")
	}
	if s.config.StoreCheck == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(req.Context(), storeCheckTimeout)
	defer cancel()
	return s.config.StoreCheck(ctx)
}
