package client

import (
	"context"
	"fmt"
	"reflect"
	"sync"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"

	"knarr/store"
)

// Tables says where the objects of a resource are. The part of knarr that opens the tables implements it.
type Tables interface {
	// ForObject finds the resource of a Go type, and its table. The resource is also returned while there is no table; false means that the
	// type belongs to no resource at all. obj is only looked at for its type.
	ForObject(obj runtime.Object) (*store.Table, schema.GroupVersionResource, bool)
	// ForResource finds the table of a resource, whatever version is asked for; false while there is none.
	ForResource(gvr schema.GroupVersionResource) (*store.Table, bool)
	// Changed returns a channel that is closed at the next time that a table comes or goes.
	Changed() <-chan struct{}
	// Revision is the newest published revision of the store behind the tables.
	Revision() int64
}

// Options are what factories of informers need.
type Options struct {
	// Tables are required.
	Tables Tables
	// Convert gives a private copy of obj in another version of its group; nil: informers of other versions than the stored one show nothing
	// and log why.
	Convert func(obj runtime.Object, gv schema.GroupVersion) (runtime.Object, error)
	// Fields are the selectable fields; nil is SelectableFields.
	Fields Fields
	// Namespace restricts all informers; "" is all.
	Namespace string
	// Tweak may set the label and field selector of all informers.
	Tweak func(*metav1.ListOptions)
	// Resync is the period in which handlers are told of every object again; 0 is never.
	Resync time.Duration
}

func (o *Options) fields() Fields {
	if o.Fields != nil {
		return o.Fields
	}
	return SelectableFields
}

// informerSet is what all factories share: informers by key, started once, shut down together.
type informerSet[K comparable] struct {
	options Options

	mu           sync.Mutex
	informers    map[K]cache.SharedIndexInformer
	running      map[K]bool
	shuttingDown bool
	done         sync.WaitGroup
}

func newInformerSet[K comparable](o Options) *informerSet[K] {
	return &informerSet[K]{options: o, informers: map[K]cache.SharedIndexInformer{}, running: map[K]bool{}}
}

// get returns the informer of a key, made at most once.
func (s *informerSet[K]) get(key K, create func() cache.SharedIndexInformer) cache.SharedIndexInformer {
	s.mu.Lock()
	defer s.mu.Unlock()
	if i, ok := s.informers[key]; ok {
		return i
	}
	i := create()
	s.informers[key] = i
	return i
}

// StartWithContext runs the informers made so far that do not run yet.
func (s *informerSet[K]) StartWithContext(ctx context.Context) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.shuttingDown {
		return
	}
	for key, i := range s.informers {
		if !s.running[key] {
			s.running[key] = true
			s.done.Go(func() { i.RunWithContext(ctx) })
		}
	}
}

// Start is StartWithContext with a channel.
func (s *informerSet[K]) Start(stop <-chan struct{}) {
	s.StartWithContext(wait.ContextForChannel(stop))
}

// Shutdown waits until the informers have ended; the context of their start must end before or meanwhile.
func (s *informerSet[K]) Shutdown() {
	s.mu.Lock()
	s.shuttingDown = true
	s.mu.Unlock()
	s.done.Wait()
}

// wait waits for the started informers and says which have synced.
func (s *informerSet[K]) wait(ctx context.Context) map[K]bool {
	s.mu.Lock()
	started := make(map[K]cache.SharedIndexInformer, len(s.running))
	for key := range s.running {
		started[key] = s.informers[key]
	}
	s.mu.Unlock()
	out := make(map[K]bool, len(started))
	for key, i := range started {
		select {
		case <-i.HasSyncedChecker().Done():
		case <-ctx.Done():
		}
		out[key] = i.HasSynced()
	}
	return out
}

// typedSet is an informerSet by Go type: the common part of the three generated factories.
type typedSet struct{ *informerSet[reflect.Type] }

// WaitForCacheSyncWithContext implements the generated factories' interface.
func (s typedSet) WaitForCacheSyncWithContext(ctx context.Context) cache.SyncResult {
	res := cache.SyncResult{Synced: s.wait(ctx)}
	for _, ok := range res.Synced {
		if !ok {
			res.Err = context.Cause(ctx)
		}
	}
	return res
}

// WaitForCacheSync implements the generated factories' interface.
func (s typedSet) WaitForCacheSync(stop <-chan struct{}) map[reflect.Type]bool {
	return s.wait(wait.ContextForChannel(stop))
}

// InformerName implements the generated factories' interface: client-go's metrics of copies do not apply.
func (typedSet) InformerName() *cache.InformerName { return nil }

// forObject returns the informer of a type. constructor is the generated or hand-made constructor, build calls it with a client on the
// given configuration.
func (s typedSet) forObject(obj runtime.Object, constructor any, build func(*rest.Config) (cache.SharedIndexInformer, error)) cache.SharedIndexInformer {
	return s.get(reflect.TypeOf(obj), func() cache.SharedIndexInformer {
		sc, indexers := scopeOf(s.options.Namespace, s.options.Tweak), cache.Indexers{cache.NamespaceIndex: cache.MetaNamespaceIndexFunc}
		if !isDefaultConstructor(constructor) {
			var err error
			if sc, indexers, err = probe(build); err != nil {
				panic(fmt.Sprintf("client: informer of %T: %v", obj, err)) // a programming error: the caller passed no informer constructor
			}
		}
		return s.options.typedInformer(obj, sc, indexers)
	})
}

// typedInformer makes an informer of obj's type.
func (o *Options) typedInformer(obj runtime.Object, sc scope, indexers cache.Indexers) cache.SharedIndexInformer {
	tables := o.Tables
	_, gvr, ok := tables.ForObject(obj)
	if !ok {
		klog.ErrorS(nil, "An informer is asked for a type that no resource has; it never syncs", "type", fmt.Sprintf("%T", obj))
	}
	f, err := newFilter(sc, o.fields(), obj)
	if err != nil {
		panic(fmt.Sprintf("client: informer of %s: %v", gvr, err)) // a programming error: selectors come from code
	}
	src := source{revision: tables.Revision, changed: tables.Changed, locate: func() *store.Table {
		t, _, _ := tables.ForObject(obj)
		return t
	}}
	return newInformer(newView(gvr.GroupResource().String(), src, f, o.toType(obj, gvr.GroupVersion()), indexers), o.Resync)
}

// toType is the projection to obj's type: none for objects that have it already.
func (o *Options) toType(obj runtime.Object, gv schema.GroupVersion) func(runtime.Object) (runtime.Object, error) {
	want, convert := reflect.TypeOf(obj), o.Convert
	return func(stored runtime.Object) (runtime.Object, error) {
		if reflect.TypeOf(stored) == want {
			return stored, nil
		}
		if convert == nil {
			return nil, fmt.Errorf("stored as %T, asked for as %s, and no conversion is configured", stored, want)
		}
		return convert(stored, gv)
	}
}
