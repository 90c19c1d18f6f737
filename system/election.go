package system

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/uuid"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
	_ "k8s.io/component-base/metrics/prometheus/clientgo/leaderelection" // leader_election_master_status: who leads
)

// Times of an election, upstream's defaults: who leads and cannot renew its lease for renewDeadline stops, and leaseDuration after the last
// renewal another takes over. What lies between them is the time to stop in.
const (
	leaseDuration = 15 * time.Second
	renewDeadline = 10 * time.Second
	retryPeriod   = 2 * time.Second
	// resignTimeout bounds giving the lease back in the end.
	resignTimeout = 5 * time.Second
)

// election lets one of several servers run a part.
type election struct {
	lock resourcelock.Interface
	run  func(context.Context) error
}

// newElection prepares the election for the lease name in kube-system; config acts as who may write it. run is called each time that this
// server becomes the leader, with a context that ends when it no longer is; it has to return soon then.
func newElection(name string, config *rest.Config, run func(context.Context) error) (*election, error) {
	host, err := os.Hostname()
	if err != nil {
		return nil, err
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return nil, err
	}
	lock, err := resourcelock.New(resourcelock.LeasesResourceLock, metav1.NamespaceSystem, name, client.CoreV1(), client.CoordinationV1(),
		resourcelock.ResourceLockConfig{Identity: host + "_" + string(uuid.NewUUID())})
	return &election{lock: lock, run: run}, err
}

// stand is a candidate for the lease, term after term, until ctx ends or the part fails.
func (e *election) stand(ctx context.Context) error {
	for ctx.Err() == nil {
		if err := e.term(ctx); err != nil {
			return err
		}
	}
	return nil
}

// term waits for the lease, runs the part while it is held, and returns when the part has ended. The lease is given back only then: nobody
// else may begin before.
func (e *election) term(ctx context.Context) error {
	standing, resign := context.WithCancel(context.WithoutCancel(ctx))
	defer resign()
	led := make(chan context.Context, 1)
	elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
		Lock: e.lock, LeaseDuration: leaseDuration, RenewDeadline: renewDeadline, RetryPeriod: retryPeriod, Name: e.lock.Describe(),
		Callbacks: leaderelection.LeaderCallbacks{OnStartedLeading: func(leading context.Context) { led <- leading }, OnStoppedLeading: func() {}},
	})
	if err != nil {
		return err
	}
	over := make(chan struct{})
	go func() { defer close(over); elector.Run(standing) }()
	defer func() { resign(); <-over; e.giveBack(ctx) }()
	select {
	case leading := <-led:
		return e.lead(ctx, leading)
	case <-over: // cannot be: only resign ends it before it has led
		return nil
	case <-ctx.Done():
		return nil
	}
}

// lead runs the part until ctx or the lead ends.
func (e *election) lead(ctx, leading context.Context) error {
	working, stop := context.WithCancel(leading)
	defer stop()
	defer context.AfterFunc(ctx, stop)()
	err := e.run(working)
	switch {
	case errors.Is(err, context.Canceled) && working.Err() != nil:
		err = nil
	case err == nil && working.Err() == nil:
		err = errors.New("ended unexpectedly")
	}
	if err != nil {
		return fmt.Errorf("while leading %s: %w", e.lock.Describe(), err)
	}
	return nil
}

// giveBack frees the lease where this server still holds it, so that another need not wait until it has run out.
func (e *election) giveBack(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), resignTimeout)
	defer cancel()
	record, _, err := e.lock.Get(ctx)
	if err != nil || record.HolderIdentity != e.lock.Identity() {
		return
	}
	now := metav1.Now()
	// A failure means that others wait for the lease to run out.
	_ = e.lock.Update(ctx, resourcelock.LeaderElectionRecord{
		LeaseDurationSeconds: 1, LeaderTransitions: record.LeaderTransitions, RenewTime: now, AcquireTime: now,
	})
}
