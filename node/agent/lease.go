package agent

import (
	"context"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	v1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/klog/v2"
)

const (
	// leaseSeconds is how long the node counts as alive after a renewal.
	leaseSeconds = 40
	// leaseRenew is the time between renewals.
	leaseRenew = 10 * time.Second
	// leaseRetry is the pause after a failed renewal.
	leaseRetry = time.Second
)

// keepLease renews the node's lease until ctx ends.
func (a *Agent) keepLease(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	var held *coordinationv1.Lease
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		next, err := a.renewLease(ctx, held)
		if err != nil {
			if ctx.Err() == nil {
				klog.FromContext(ctx).Error(err, "Node lease not renewed")
			}
			held = nil // read it again
			timer.Reset(leaseRetry)
			continue
		}
		held = next
		timer.Reset(leaseRenew)
	}
}

// renewLease writes the lease with the present time. held is the lease as it
// was written last, nil if that is not known.
func (a *Agent) renewLease(ctx context.Context, held *coordinationv1.Lease) (*coordinationv1.Lease, error) {
	leases := a.opts.Client.CoordinationV1().Leases(v1.NamespaceNodeLease)
	if held == nil {
		old, err := leases.Get(ctx, a.opts.NodeName, metav1.GetOptions{})
		switch {
		case apierrors.IsNotFound(err):
			return leases.Create(ctx, a.lease(&coordinationv1.Lease{}), metav1.CreateOptions{})
		case err != nil:
			return nil, err
		}
		held = old
	}
	return leases.Update(ctx, a.lease(held.DeepCopy()), metav1.UpdateOptions{})
}

func (a *Agent) lease(l *coordinationv1.Lease) *coordinationv1.Lease {
	name, seconds, now := a.opts.NodeName, int32(leaseSeconds), metav1.NewMicroTime(time.Now())
	l.Name, l.Namespace = name, v1.NamespaceNodeLease
	l.Spec.HolderIdentity, l.Spec.LeaseDurationSeconds, l.Spec.RenewTime = &name, &seconds, &now
	if node := a.node.get(); len(l.OwnerReferences) == 0 && node.UID != "" {
		l.OwnerReferences = []metav1.OwnerReference{{APIVersion: "v1", Kind: "Node", Name: name, UID: node.UID}}
	}
	return l
}
