package etcd

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"knarr/store"
)

// Engine implements store.Engine. Give it to store.Open, which then owns it.
type Engine struct {
	opts   Options
	client *clientv3.Client
	leases leases
	host   store.Host

	ctx     context.Context // ends with Close
	cancel  context.CancelFunc
	running sync.WaitGroup // of the goroutines

	first        int64         // revision at Start; constant after
	begin        chan struct{} // closed when publication may begin
	beginOnce    sync.Once
	wantProgress chan struct{} // capacity 1

	// publishing is held while anything is published, and during Load. It guards:
	publishing sync.Mutex
	keys       map[string]struct{} // every key that may exist
	deleted    map[string]int64    // by directory of keys: revision of the last deletion, as far as it is known
	floor      int64               // up to here deletions are unknown

	// mu guards what follows. It is taken last.
	mu        sync.Mutex
	closing   bool
	commits   sync.WaitGroup // Add with mu held
	asking    bool           // a goroutine asks etcd for its revision
	nextRound *round         // whom its next answer is for; nil: nobody
	pending   map[string][]*pending
	published int64         // written with publishing held, too
	moved     chan struct{} // closed and replaced when published grows
}

// Open connects to a cluster. It waits for an answer until ctx ends, at most RequestTimeout. Errors say what is wrong with the
// options or that etcd does not answer.
func Open(ctx context.Context, o Options) (*Engine, error) {
	if err := o.setDefaults(); err != nil {
		return nil, err
	}
	client, err := o.dial()
	if err != nil {
		return nil, err
	}
	e := &Engine{
		opts:         o,
		client:       client,
		leases:       leases{client: client},
		begin:        make(chan struct{}),
		wantProgress: make(chan struct{}, 1),
		keys:         map[string]struct{}{},
		deleted:      map[string]int64{},
		pending:      map[string][]*pending{},
		moved:        make(chan struct{}),
	}
	e.ctx, e.cancel = context.WithCancel(context.Background())
	_, err = e.current(ctx)
	if err != nil {
		err = fmt.Errorf("cannot use etcd; check the endpoints and certificates, and that it runs: %w", err)
	} else {
		err = e.checkVersions(ctx)
	}
	if err != nil {
		e.cancel()
		return nil, errors.Join(err, client.Close())
	}
	return e, nil
}

// checkVersions refuses members whose answer to a progress request may come before the events that it vouches for, or never. Members that do not
// answer are not asked again.
func (e *Engine) checkVersions(ctx context.Context) error {
	for _, endpoint := range e.opts.Endpoints {
		ctx, cancel := context.WithTimeout(ctx, statusTimeout)
		status, err := e.client.Status(ctx, endpoint)
		cancel()
		if err == nil && !progressIsSafe(status.Version) {
			return fmt.Errorf("etcd at %s has version %s, whose progress notifications cannot be relied on; upgrade it to 3.5.13 or later", endpoint, status.Version)
		}
	}
	return nil
}

// progressIsSafe says that a version has etcd-io/etcd#15220 and #17507 repaired, as upstream asks for; so does one that cannot be read.
func progressIsSafe(version string) bool {
	var major, minor, patch int
	if n, _ := fmt.Sscanf(version, "%d.%d.%d", &major, &minor, &patch); n != 3 || major > 3 {
		return true
	}
	return minor > 5 || minor == 5 && patch >= 13 || minor == 4 && patch >= 31
}

// current asks the cluster for its revision, linearizably.
func (e *Engine) current(ctx context.Context) (int64, error) {
	ctx, cancel := context.WithTimeout(ctx, e.opts.RequestTimeout)
	defer cancel()
	resp, err := e.client.Get(ctx, e.opts.Prefix, clientv3.WithKeysOnly(), clientv3.WithLimit(1))
	if err != nil {
		return 0, e.unavailable(err)
	}
	return resp.Header.Revision, nil
}

// Start implements store.Engine.
func (e *Engine) Start(ctx context.Context, host store.Host) (int64, error) {
	rev, err := e.current(ctx)
	if err != nil {
		return 0, err
	}
	e.host, e.first = host, rev
	e.floor = max(1, rev-tailRevisions)
	e.published = e.floor
	e.running.Add(1)
	go e.follow()
	if err := e.await(ctx, rev); err != nil {
		return 0, err
	}
	if e.opts.CompactEvery > 0 {
		e.running.Add(1)
		go e.compact()
	}
	return rev, nil
}

// open lets publication begin: not before the store has taken note of Start's revision.
func (e *Engine) open() { e.beginOnce.Do(func() { close(e.begin) }) }

// Sync implements store.SharedEngine.
func (e *Engine) Sync(ctx context.Context) error {
	e.open()
	rev, err := e.sharedCurrent(ctx)
	if err != nil {
		return err
	}
	return e.await(ctx, rev)
}

// await waits until a revision is published, at most RequestTimeout.
func (e *Engine) await(ctx context.Context, rev int64) error {
	var deadline, ask *time.Timer
	for {
		e.mu.Lock()
		reached, moved := e.published >= rev, e.moved
		e.mu.Unlock()
		if reached {
			return nil
		}
		if deadline == nil {
			deadline, ask = time.NewTimer(e.opts.RequestTimeout), time.NewTimer(progressEvery/10)
			defer deadline.Stop()
			defer ask.Stop()
		}
		select {
		case <-moved:
		case <-ask.C:
			e.askProgress()
			ask.Reset(progressEvery)
		case <-ctx.Done():
			return ctx.Err()
		case <-e.ctx.Done():
			return store.ErrClosed
		case <-deadline.C:
			return e.unavailable(fmt.Errorf("its watch has not reached revision %d within %s", rev, e.opts.RequestTimeout))
		}
	}
}

// askProgress has the stream ask for a progress notification.
func (e *Engine) askProgress() {
	select {
	case e.wantProgress <- struct{}{}:
	default:
	}
}

// Load implements store.Engine.
func (e *Engine) Load(ctx context.Context, prefix string, _ store.Class, fn func(store.Entry) error, done func(int64)) error {
	if !strings.HasPrefix(prefix, e.opts.Prefix) {
		return fmt.Errorf("etcd: %s does not lie under the engine's prefix %s", prefix, e.opts.Prefix)
	}
	// What is read must not be compacted: in a quiet prefix the last published revision may be.
	if err := e.Sync(ctx); err != nil {
		return err
	}
	e.publishing.Lock()
	defer e.publishing.Unlock()
	e.mu.Lock()
	rev := e.published
	e.mu.Unlock()
	history := e.floor
	_, err := e.read(ctx, prefix, rev, func(kv *mvccpb.KeyValue) error {
		history = max(history, kv.ModRevision)
		key := string(kv.Key)
		e.keys[key] = struct{}{}
		return fn(store.Entry{Key: key, Value: kv.Value, Revision: kv.ModRevision, CreateRevision: kv.CreateRevision})
	})
	if err != nil {
		return err
	}
	for dir, rev := range e.deleted {
		if strings.HasPrefix(dir, prefix) {
			history = max(history, rev)
		}
	}
	done(history)
	return nil
}

// read calls fn for every key under the prefix as it was at a revision, page by page, and returns that revision; 0 is the newest.
func (e *Engine) read(ctx context.Context, prefix string, rev int64, fn func(*mvccpb.KeyValue) error) (int64, error) {
	from, end := prefix, clientv3.GetPrefixRangeEnd(prefix)
	for {
		resp, err := e.page(ctx, from, end, rev)
		if err != nil {
			return 0, e.unavailable(err)
		}
		if rev == 0 {
			rev = resp.Header.Revision
		}
		for _, kv := range resp.Kvs {
			if err := fn(kv); err != nil {
				return 0, err
			}
		}
		if !resp.More || len(resp.Kvs) == 0 {
			return rev, nil
		}
		from = string(resp.Kvs[len(resp.Kvs)-1].Key) + "\x00"
	}
}

func (e *Engine) page(ctx context.Context, from, end string, rev int64) (*clientv3.GetResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, e.opts.RequestTimeout)
	defer cancel()
	return e.client.Get(ctx, from, clientv3.WithRange(end), clientv3.WithRev(rev), clientv3.WithLimit(pageKeys))
}

// noteDeletion remembers when something was last deleted in a key's directory. Called with publishing held.
func (e *Engine) noteDeletion(key string, rev int64) {
	dir := key[:strings.LastIndexByte(key, '/')+1]
	if _, known := e.deleted[dir]; !known && len(e.deleted) >= maxDirs {
		clear(e.deleted)
		e.floor = max(e.floor, rev-1)
	}
	e.deleted[dir] = rev
}

// Close implements store.Engine.
func (e *Engine) Close() error {
	e.mu.Lock()
	if e.closing {
		e.mu.Unlock()
		return nil
	}
	e.closing = true
	e.mu.Unlock()
	e.commits.Wait()
	e.cancel()
	e.running.Wait()
	if err := e.client.Close(); err != nil && !errors.Is(err, context.Canceled) {
		return fmt.Errorf("etcd: close the connection: %w", err)
	}
	return nil
}
