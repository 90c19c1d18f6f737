package apiserver

import (
	"context"
	"fmt"
	"io"
	"sync"

	"k8s.io/apiserver/pkg/admission"
	mutatingpolicy "k8s.io/apiserver/pkg/admission/plugin/policy/mutating"
	validatingpolicy "k8s.io/apiserver/pkg/admission/plugin/policy/validating"
)

// dormant is a plugin of admission policies, set up but not begun. Once begun, such a plugin looks each second whether policies have
// changed, and the mutating one each five seconds asks the API for its schema: a fifth of what an idle server would do. It begins with
// the first request that is its business (see idleness.policies): one on a policy, before there is any, or, where policies are there
// already, any request, which then waits until the plugin knows them.
type dormant struct {
	admission.Interface
	begin func() error // once, whoever calls
}

func newDormant(plugin admission.Interface, informers func()) dormant {
	return dormant{plugin, sync.OnceValue(func() error {
		if err := admission.ValidateInitialization(plugin); err != nil {
			return fmt.Errorf("begin an admission plugin: %w", err)
		}
		informers() // it has asked for some
		return nil
	})}
}

// dormantMutator is a dormant plugin that mutates.
type dormantMutator struct{ dormant }

// Admit implements admission.MutationInterface.
func (d dormantMutator) Admit(ctx context.Context, a admission.Attributes, o admission.ObjectInterfaces) error {
	if err := d.begin(); err != nil {
		return err
	}
	return d.Interface.(admission.MutationInterface).Admit(ctx, a, o)
}

// dormantValidator is a dormant plugin that validates.
type dormantValidator struct{ dormant }

// Validate implements admission.ValidationInterface.
func (d dormantValidator) Validate(ctx context.Context, a admission.Attributes, o admission.ObjectInterfaces) error {
	if err := d.begin(); err != nil {
		return err
	}
	return d.Interface.(admission.ValidationInterface).Validate(ctx, a, o)
}

// newPolicyPlugin makes one of upstream's plugins of admission policies, dormant; nil where the name is not one of theirs. informers starts
// what informers were asked for.
func newPolicyPlugin(name string, set admission.PluginInitializer, informers func()) (admission.Interface, error) {
	var config io.Reader // none: policies of files would be there from the beginning
	switch name {
	case mutatingpolicy.PluginName:
		plugin, err := mutatingpolicy.NewPlugin(config)
		if err != nil {
			return nil, err
		}
		set.Initialize(plugin)
		return dormantMutator{newDormant(plugin, informers)}, nil
	case validatingpolicy.PluginName:
		plugin, err := validatingpolicy.NewPlugin(config)
		if err != nil {
			return nil, err
		}
		set.Initialize(plugin)
		return dormantValidator{newDormant(plugin, informers)}, nil
	}
	return nil, nil
}
