package etcd

import (
	"context"
	"math"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// The grouping of objects by leases; upstream's values.
const (
	leaseReuse        = 60 * time.Second // at most this much longer than asked lives an object
	leaseReuseDivisor = 20               // and at most this part of its TTL
	leaseMaxObjects   = 1000
)

// leases gives out etcd leases, several objects one of them: the last one as long as it fits. Safe for concurrent use.
type leases struct {
	client *clientv3.Client

	mu      sync.Mutex
	last    clientv3.LeaseID
	expires time.Time // of last
	objects int       // that last was given to
}

// get returns a lease that lives for at least ttl, and not much longer.
func (l *leases) get(ctx context.Context, ttl time.Duration) (clientv3.LeaseID, error) {
	ttl = max(ttl, time.Second)
	extra := min(ttl/leaseReuseDivisor, leaseReuse)
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	fits := !l.expires.Before(now.Add(ttl)) && !l.expires.After(now.Add(ttl+extra+time.Second))
	if l.last != 0 && fits && l.objects < leaseMaxObjects {
		l.objects++
		return l.last, nil
	}
	seconds := int64(math.Ceil((ttl + extra).Seconds()))
	resp, err := l.client.Grant(ctx, seconds)
	if err != nil {
		return 0, err
	}
	l.last, l.expires, l.objects = resp.ID, now.Add(time.Duration(seconds)*time.Second), 1
	return l.last, nil
}

// forget drops a lease that is gone.
func (l *leases) forget(id clientv3.LeaseID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.last == id {
		l.last = 0
	}
}
