package apiserver

import (
	"errors"
	"fmt"
	"net/http"

	auditinternal "k8s.io/apiserver/pkg/apis/audit"
	"k8s.io/apiserver/pkg/audit"
	genericapiserver "k8s.io/apiserver/pkg/server"
	genericoptions "k8s.io/apiserver/pkg/server/options"
)

// auditing is what is recorded of requests, and where. The zero value records nothing.
type auditing struct {
	backend audit.Backend
	rules   audit.PolicyRuleEvaluator
	stop    chan struct{} // ends the backends' own work; nil before start
}

// newAuditing reads the policy and opens the backends. They record from start on.
func newAuditing(o *genericoptions.AuditOptions) (auditing, error) {
	if o == nil || o.PolicyFile == "" {
		return auditing{}, nil
	}
	if err := errors.Join(o.Validate()...); err != nil {
		return auditing{}, fmt.Errorf("audit: %w", err)
	}
	var c genericapiserver.Config
	if err := o.ApplyTo(&c); err != nil {
		return auditing{}, fmt.Errorf("audit: %w", err)
	}
	if c.AuditBackend == nil {
		return auditing{}, nil
	}
	return auditing{backend: c.AuditBackend, rules: c.AuditPolicyRuleEvaluator}, nil
}

// sink is nil when nothing is recorded, which makes upstream's filters vanish.
func (a *auditing) sink() audit.Sink {
	if a.backend == nil {
		return nil
	}
	return a.backend
}

// start lets the backends work.
func (a *auditing) start() error {
	if a.backend == nil {
		return nil
	}
	a.stop = make(chan struct{})
	if err := a.backend.Run(a.stop); err != nil {
		return fmt.Errorf("audit: %w", err)
	}
	return nil
}

// close writes out what the backends hold; nothing may be recorded after it.
func (a *auditing) close() {
	if a.stop == nil {
		return
	}
	close(a.stop)
	a.backend.Shutdown()
}

// recordsAnswer tells requests whose answers the policy wants in the record.
func recordsAnswer(req *http.Request) bool {
	ac := audit.AuditContextFrom(req.Context())
	return ac != nil && ac.Enabled() && ac.GetEventLevel().GreaterOrEqual(auditinternal.LevelRequestResponse)
}
