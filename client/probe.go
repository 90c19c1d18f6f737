package client

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"reflect"
	goruntime "runtime"
	"strings"
	"sync"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
)

// scope is what an informer's owner asked for: the part of a resource that it wants to see.
type scope struct {
	namespace     string // "" is all
	labelSelector string // "" is all
	fieldSelector string // "" is all
}

// scopeOf is the scope of a factory's ordinary informers.
func scopeOf(namespace string, tweak func(*metav1.ListOptions)) scope {
	var o metav1.ListOptions
	if tweak != nil {
		tweak(&o)
	}
	return scope{namespace: namespace, labelSelector: o.LabelSelector, fieldSelector: o.FieldSelector}
}

// isDefaultConstructor says whether fn is the generated constructor of informer-gen (`(*podInformer).defaultInformer`), whose scope is the
// factory's. The answer false is always safe: then the scope is found by probe.
func isDefaultConstructor(fn any) bool {
	f := goruntime.FuncForPC(reflect.ValueOf(fn).Pointer())
	if f == nil {
		return false
	}
	name := f.Name()
	return strings.HasSuffix(name, ".defaultInformer-fm") && strings.HasPrefix(name, "k8s.io/") && strings.Contains(name, "/informers/")
}

// errProbed ends a probe's only request.
var errProbed = errors.New("probe: request seen")

// probe finds the scope and the indexers of an informer that somebody builds by hand (the scheduler's pods, for one). Upstream hides both in
// closures, so the informer is run against a transport that notes its first request and answers none.
func probe(build func(*rest.Config) (cache.SharedIndexInformer, error)) (scope, cache.Indexers, error) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var once sync.Once
	var seen *url.URL
	informer, err := build(&rest.Config{Host: inProcessHost, QPS: -1, Transport: roundTripperFunc(func(r *http.Request) (*http.Response, error) {
		once.Do(func() { seen = r.URL; cancel() })
		return nil, errProbed
	})})
	if err != nil {
		return scope{}, nil, err
	}
	if err := informer.SetWatchErrorHandlerWithContext(func(context.Context, *cache.Reflector, error) {}); err != nil {
		return scope{}, nil, fmt.Errorf("probe of a hand-made informer: %w", err)
	}
	indexers := informer.GetIndexer().GetIndexers()
	informer.RunWithContext(ctx)
	once.Do(func() {}) // orders the read below after the write above
	if seen == nil {
		return scope{}, nil, errors.New("probe of a hand-made informer: it asked nothing")
	}
	q := seen.Query()
	return scope{namespaceOf(seen.Path), q.Get("labelSelector"), q.Get("fieldSelector")}, indexers, nil
}

// namespaceOf takes the namespace out of a collection's path, "" where there is none.
func namespaceOf(path string) string {
	parts := strings.Split(strings.Trim(path, "/"), "/")
	for i, p := range parts {
		if p == "namespaces" && i+2 < len(parts) {
			return parts[i+1]
		}
	}
	return ""
}

type roundTripperFunc func(*http.Request) (*http.Response, error)

func (f roundTripperFunc) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }
