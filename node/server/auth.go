package server

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/cache"
	"k8s.io/client-go/kubernetes"
)

const (
	// How long answers of the API about a token or about access are believed,
	// as upstream's.
	tokenTTL   = 2 * time.Minute
	allowedTTL = 5 * time.Minute
	deniedTTL  = 30 * time.Second
	// maxAnswers bounds how many answers are kept.
	maxAnswers = 1024
	// reviewTimeout bounds one question to the API.
	reviewTimeout = 10 * time.Second

	groupMasters       = "system:masters"
	groupAuthenticated = "system:authenticated"
)

var errNoCredentials = errors.New("no valid credentials")

// identity is who sent a request.
type identity struct {
	name, uid string
	groups    []string
	extra     map[string]authorizationv1.ExtraValue
}

// guard tells who may use the API of the node: clients with a certificate of
// the cluster's client CA (verified by TLS already) or a token that the API
// server knows; what they may do, the API server says (nodes/proxy and its
// finer siblings). Safe for concurrent use.
type guard struct {
	client kubernetes.Interface
	node   string
	tokens *cache.LRUExpireCache
	access *cache.LRUExpireCache
}

func newGuard(client kubernetes.Interface, node string) *guard {
	return &guard{client: client, node: node, tokens: cache.NewLRUExpireCache(maxAnswers), access: cache.NewLRUExpireCache(maxAnswers)}
}

func (g *guard) authenticate(r *http.Request) (*identity, error) {
	if r.TLS != nil && len(r.TLS.VerifiedChains) > 0 {
		leaf := r.TLS.VerifiedChains[0][0]
		if leaf.Subject.CommonName != "" {
			return &identity{name: leaf.Subject.CommonName, groups: append(slices.Clone(leaf.Subject.Organization), groupAuthenticated)}, nil
		}
	}
	scheme, token, ok := strings.Cut(r.Header.Get("Authorization"), " ")
	if !ok || !strings.EqualFold(scheme, "bearer") || token == "" {
		return nil, errNoCredentials
	}
	key := sha256.Sum256([]byte(token))
	if known, ok := g.tokens.Get(key); ok {
		return known.(*identity), nil
	}
	ctx, cancel := context.WithTimeout(r.Context(), reviewTimeout)
	defer cancel()
	review, err := g.client.AuthenticationV1().TokenReviews().Create(ctx,
		&authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: token}}, metav1.CreateOptions{})
	if err != nil {
		return nil, err
	}
	if !review.Status.Authenticated {
		return nil, errNoCredentials
	}
	u := review.Status.User
	id := &identity{name: u.Username, uid: u.UID, groups: u.Groups, extra: map[string]authorizationv1.ExtraValue{}}
	for k, v := range u.Extra {
		id.extra[k] = authorizationv1.ExtraValue(v)
	}
	g.tokens.Add(key, id, tokenTTL)
	return id, nil
}

// subresources names what of the node a path is about, the finest first.
func subresources(path string) []string {
	under := func(prefix string) bool { return path == prefix || strings.HasPrefix(path, prefix+"/") }
	switch {
	case under("/stats"):
		return []string{"stats"}
	case under("/metrics"):
		return []string{"metrics"}
	case under("/logs"):
		return []string{"log"}
	case under("/checkpoint"):
		return []string{"checkpoint"}
	case under("/pods"), under("/runningpods"):
		return []string{"pods", "proxy"}
	case under("/healthz"):
		return []string{"healthz", "proxy"}
	case under("/configz"):
		return []string{"configz", "proxy"}
	}
	return []string{"proxy"}
}

func verbOf(method string) string {
	switch method {
	case http.MethodPost:
		return "create"
	case http.MethodPut:
		return "update"
	case http.MethodPatch:
		return "patch"
	case http.MethodDelete:
		return "delete"
	}
	return "get"
}

// authorize returns nil if the request is allowed.
func (g *guard) authorize(r *http.Request, u *identity) error {
	if slices.Contains(u.groups, groupMasters) {
		return nil
	}
	subs, verb := subresources(r.URL.Path), verbOf(r.Method)
	for _, sub := range subs {
		ok, err := g.allowed(r.Context(), u, verb, sub)
		if err != nil {
			//lint:ignore ST1005 upstream's kubelet answers with these words
			return fmt.Errorf("Authorization error (user=%s, verb=%s, resource=nodes, subresource(s)=%v): %w", u.name, verb, subs, err)
		}
		if ok {
			return nil
		}
	}
	//lint:ignore ST1005 upstream's kubelet answers with these words
	return fmt.Errorf("Forbidden (user=%s, verb=%s, resource=nodes, subresource(s)=%v)", u.name, verb, subs)
}

func (g *guard) allowed(ctx context.Context, u *identity, verb, sub string) (bool, error) {
	key := fmt.Sprintf("%q %q %q %q %q %q", u.name, u.uid, u.groups, u.extra, verb, sub)
	if known, ok := g.access.Get(key); ok {
		return known.(bool), nil
	}
	ctx, cancel := context.WithTimeout(ctx, reviewTimeout)
	defer cancel()
	review, err := g.client.AuthorizationV1().SubjectAccessReviews().Create(ctx, &authorizationv1.SubjectAccessReview{
		Spec: authorizationv1.SubjectAccessReviewSpec{User: u.name, UID: u.uid, Groups: u.groups, Extra: u.extra,
			ResourceAttributes: &authorizationv1.ResourceAttributes{Verb: verb, Version: "v1", Resource: "nodes", Subresource: sub, Name: g.node}},
	}, metav1.CreateOptions{})
	if err != nil {
		return false, err
	}
	ttl := deniedTTL
	if review.Status.Allowed {
		ttl = allowedTTL
	}
	g.access.Add(key, review.Status.Allowed, ttl)
	return review.Status.Allowed, nil
}

func baseContext(ctx context.Context) func(net.Listener) context.Context {
	return func(net.Listener) context.Context { return ctx }
}
