package client

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"

	"knarr/store"
)

// errReadOnly is what the writing methods of cache.Store return.
var errReadOnly = errors.New("this informer's store is a view of the cluster's own store: write through a clientset")

// source finds the table of a resource. A table may come into being, be replaced and go while views of it exist (custom resources).
type source struct {
	locate   func() *store.Table // nil: there is none now
	changed  func() <-chan struct{}
	revision func() int64 // newest published revision of the whole store
}

// view is a cache.Indexer over a table: it holds no objects. What it returns is what the table holds at the moment of the call, restricted
// by a filter and, where the owner asked for another form than the stored one, projected at each call.
//
// A view is always at least as new as the events that handlers have seen, as with client-go: a table publishes first its indexes and its
// revision, and only then its events.
type view struct {
	name    string // for messages: the resource
	source  source
	filter  filter
	project func(runtime.Object) (runtime.Object, error) // nil: as stored

	current atomic.Pointer[store.Table] // nil until the table exists

	mu       sync.RWMutex
	indexers cache.Indexers          // guarded by mu
	bound    map[string]*store.Table // guarded by mu: the table on which each indexer is registered
}

var _ cache.Indexer = (*view)(nil)

// viewID makes the names of views' indexes unique within the process.
var viewID atomic.Int64

func newView(name string, src source, f filter, project func(runtime.Object) (runtime.Object, error), indexers cache.Indexers) *view {
	v := &view{name: fmt.Sprintf("%s#%d", name, viewID.Add(1)), source: src, filter: f, project: project,
		indexers: cache.Indexers{}, bound: map[string]*store.Table{}}
	for n, fn := range indexers {
		v.indexers[n] = fn
	}
	v.bind()
	return v
}

// bind looks the table up, registers the view's indexes on it, and only then shows it.
func (v *view) bind() *store.Table {
	t := v.source.locate()
	if t == v.current.Load() {
		return t
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if t != nil {
		for name := range v.indexers {
			v.indexLocked(t, name)
		}
	}
	v.current.Store(t)
	return t
}

// table is the current table, nil if there is none yet.
func (v *view) table() *store.Table {
	if t := v.current.Load(); t != nil {
		return t
	}
	return v.bind()
}

// indexName is the table's name for one of the view's indexes.
func (v *view) indexName(name string) string { return v.name + "/" + name }

// indexLocked registers one index on t. By namespace needs none: keys are ordered by it.
func (v *view) indexLocked(t *store.Table, name string) {
	fn := v.indexers[name]
	if v.bound[name] == t || isNamespaceIndex(fn) {
		return
	}
	err := t.AddIndex(v.indexName(name), func(r *store.Record) []string { return v.indexValues(name, fn, r) })
	if err != nil {
		klog.ErrorS(err, "Index already there", "index", v.indexName(name))
	}
	v.bound[name] = t
}

// indexValues is called under the store's lock: whatever the function does, the store goes on.
func (v *view) indexValues(name string, fn cache.IndexFunc, r *store.Record) (values []string) {
	defer func() {
		if reason := recover(); reason != nil {
			klog.ErrorS(nil, "Panic in an index function; the object is left out of the index", "index", name, "key", r.Key, "panic", reason)
			values = nil
		}
	}()
	obj, err := v.shape(r.Object)
	if err == nil {
		values, err = fn(obj)
	}
	if err != nil {
		klog.ErrorS(err, "Index function failed; the object is left out of the index", "index", name, "key", r.Key)
		return nil
	}
	return values
}

// isNamespaceIndex says whether fn is client-go's own index by namespace.
func isNamespaceIndex(fn cache.IndexFunc) bool {
	return reflect.ValueOf(fn).Pointer() == reflect.ValueOf(cache.MetaNamespaceIndexFunc).Pointer()
}

// shape gives the form that the owner asked for.
func (v *view) shape(obj runtime.Object) (runtime.Object, error) {
	if v.project == nil {
		return obj, nil
	}
	out, err := v.project(obj)
	if err != nil {
		return nil, fmt.Errorf("informer of %s: %w", v.name, err)
	}
	return out, nil
}

// see gives the record's object if the view shows it.
func (v *view) see(r *store.Record) (runtime.Object, bool) {
	if r == nil || !v.filter.matches(r.Object) {
		return nil, false
	}
	obj, err := v.shape(r.Object)
	if err != nil {
		klog.ErrorS(err, "Object not shown", "key", r.Key)
		return nil, false
	}
	return obj, true
}

// prefix of the keys that the view can show.
func (v *view) prefix(t *store.Table) string {
	if v.filter.namespace == "" {
		return t.Prefix()
	}
	return t.Prefix() + v.filter.namespace + "/"
}

// HasObjects says whether the store of one of this package's informers shows an object in the namespace. It looks at no more than it has to.
func HasObjects(s cache.Store, namespace string) bool {
	found := false
	s.(*view).until(namespace, func(string, runtime.Object) bool { found = true; return false })
	return found
}

// each calls fn for every object shown in the namespace ("" is all), with its informer key.
func (v *view) each(namespace string, fn func(key string, obj runtime.Object)) {
	v.until(namespace, func(key string, obj runtime.Object) bool { fn(key, obj); return true })
}

// until is each until fn gives false.
func (v *view) until(namespace string, fn func(key string, obj runtime.Object) bool) {
	t := v.table()
	if t == nil || v.filter.namespace != "" && namespace != "" && namespace != v.filter.namespace {
		return
	}
	prefix := v.prefix(t)
	if namespace != "" {
		prefix = t.Prefix() + namespace + "/"
	}
	cut := len(t.Prefix())
	t.Snapshot().Ascend(prefix, "", func(r *store.Record) bool {
		if obj, ok := v.see(r); ok {
			return fn(r.Key[cut:], obj)
		}
		return true
	})
}

// List implements cache.Store.
func (v *view) List() []any { return v.list("") }

func (v *view) list(namespace string) []any {
	var out []any
	if t := v.table(); t != nil && v.filter.all() && namespace == "" {
		out = make([]any, 0, t.Len())
	}
	v.each(namespace, func(_ string, obj runtime.Object) { out = append(out, obj) })
	return out
}

// ListKeys implements cache.Store.
func (v *view) ListKeys() []string {
	var out []string
	v.each("", func(key string, _ runtime.Object) { out = append(out, key) })
	return out
}

// Get implements cache.Store.
func (v *view) Get(obj any) (any, bool, error) {
	key, err := cache.DeletionHandlingMetaNamespaceKeyFunc(obj)
	if err != nil {
		return nil, false, cache.KeyError{Obj: obj, Err: err}
	}
	return v.GetByKey(key)
}

// GetByKey implements cache.Store. key is namespace/name, or name of a cluster-scoped object.
func (v *view) GetByKey(key string) (any, bool, error) {
	t := v.table()
	if t == nil {
		return nil, false, nil
	}
	if obj, ok := v.see(t.Get(t.Prefix() + key)); ok {
		return obj, true, nil
	}
	return nil, false, nil
}

// indexer returns the function of an index and makes sure that the current table has it.
func (v *view) indexer(name string) (cache.IndexFunc, error) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	fn := v.indexers[name]
	if fn == nil {
		return nil, fmt.Errorf("Index with name %s does not exist", name) //nolint:staticcheck // client-go's own words
	}
	return fn, nil
}

// eachIndexed calls f for every object shown under the value of an index. In no order.
func (v *view) eachIndexed(name string, fn cache.IndexFunc, value string, f func(key string, obj runtime.Object)) {
	if isNamespaceIndex(fn) {
		if value != "" {
			v.each(value, f)
			return
		}
		v.each("", func(key string, obj runtime.Object) { // the cluster-scoped ones
			if !strings.Contains(key, "/") {
				f(key, obj)
			}
		})
		return
	}
	t := v.table()
	if t == nil {
		return
	}
	cut := len(t.Prefix())
	for _, r := range t.ByIndex(v.indexName(name), value) {
		if obj, ok := v.see(r); ok {
			f(r.Key[cut:], obj)
		}
	}
}

// ByIndex implements cache.Indexer.
func (v *view) ByIndex(name, value string) ([]any, error) {
	fn, err := v.indexer(name)
	if err != nil {
		return nil, err
	}
	var out []any
	v.eachIndexed(name, fn, value, func(_ string, obj runtime.Object) { out = append(out, obj) })
	return out, nil
}

// IndexKeys implements cache.Indexer.
func (v *view) IndexKeys(name, value string) ([]string, error) {
	fn, err := v.indexer(name)
	if err != nil {
		return nil, err
	}
	var out []string
	v.eachIndexed(name, fn, value, func(key string, _ runtime.Object) { out = append(out, key) })
	slices.Sort(out)
	return out, nil
}

// Index implements cache.Indexer.
func (v *view) Index(name string, obj any) ([]any, error) {
	fn, err := v.indexer(name)
	if err != nil {
		return nil, err
	}
	values, err := fn(obj)
	if err != nil {
		return nil, err
	}
	var out []any
	seen := map[string]bool{}
	for _, value := range values {
		v.eachIndexed(name, fn, value, func(key string, obj runtime.Object) {
			if len(values) == 1 || !seen[key] {
				out = append(out, obj)
			}
			if len(values) > 1 {
				seen[key] = true
			}
		})
	}
	return out, nil
}

// ListIndexFuncValues implements cache.Indexer. It only gives values under which the view shows something.
func (v *view) ListIndexFuncValues(name string) []string {
	fn, err := v.indexer(name)
	t := v.table()
	if err != nil || t == nil {
		return nil
	}
	if !isNamespaceIndex(fn) && v.filter.all() {
		return t.IndexValues(v.indexName(name))
	}
	values := map[string]bool{}
	v.each("", func(_ string, obj runtime.Object) {
		vs, err := fn(obj)
		if err != nil {
			return
		}
		for _, value := range vs {
			values[value] = true
		}
	})
	out := make([]string, 0, len(values))
	for value := range values {
		out = append(out, value)
	}
	return out
}

// GetIndexers implements cache.Indexer; the result is the caller's.
func (v *view) GetIndexers() cache.Indexers {
	v.mu.RLock()
	defer v.mu.RUnlock()
	out := make(cache.Indexers, len(v.indexers))
	for n, fn := range v.indexers {
		out[n] = fn
	}
	return out
}

// AddIndexers implements cache.Indexer, at any time.
func (v *view) AddIndexers(indexers cache.Indexers) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	var taken []string
	for n := range indexers {
		if v.indexers[n] != nil {
			taken = append(taken, n)
		}
	}
	if len(taken) > 0 {
		slices.Sort(taken)
		return fmt.Errorf("indexer conflict: %v", taken)
	}
	t := v.current.Load()
	for n, fn := range indexers {
		v.indexers[n] = fn
		if t != nil {
			v.indexLocked(t, n)
		}
	}
	return nil
}

// LastStoreSyncResourceVersion implements cache.Store: everything up to this revision of the whole store is in the view.
func (v *view) LastStoreSyncResourceVersion() string {
	if v.table() == nil {
		return ""
	}
	return strconv.FormatInt(v.source.revision(), 10)
}

// Bookmark implements cache.Store; a view needs none.
func (v *view) Bookmark(string) {}

// Resync implements cache.Store.
func (v *view) Resync() error { return nil }

// Add implements cache.Store.
func (v *view) Add(any) error { return errReadOnly }

// Update implements cache.Store.
func (v *view) Update(any) error { return errReadOnly }

// Delete implements cache.Store.
func (v *view) Delete(any) error { return errReadOnly }

// Replace implements cache.Store.
func (v *view) Replace([]any, string) error { return errReadOnly }
