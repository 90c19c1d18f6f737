package apiserver

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"k8s.io/apiserver/pkg/apis/apiserver"
	"k8s.io/apiserver/pkg/authentication/authenticator"
	"k8s.io/apiserver/pkg/authentication/serviceaccount"
	"k8s.io/apiserver/pkg/authentication/user"
)

// maxKnownTokens bounds the tokens whose verification is remembered; beyond it all are forgotten.
const maxKnownTokens = 4096

// tokenCache remembers for a moment what service accounts' tokens proved, for requests that do not pass the filters. Those that do are
// always authenticated by upstream, which remembers as well: the two together trust no token longer than upstream's would alone, each half of it.
// Tokens that are answered with a warning (those without an identity of their own) are not remembered.
type tokenCache struct {
	next      authenticator.Request
	audiences authenticator.Audiences // of this server
	ttl       time.Duration           // zero: nothing is remembered
	now       func() time.Time
	salt      [sha256.Size]byte

	era   atomic.Int64 // grows, under mu, when the configuration changes
	mu    sync.RWMutex
	known map[[sha256.Size]byte]knownUser // guarded by mu; tokens are not kept, only their sums
}

// knownUser is who a token is from; that holds until a time, and in one era of the cache only.
type knownUser struct {
	user  user.Info
	until time.Time
	era   int64
}

func newTokenCache(next authenticator.Request, audiences authenticator.Audiences, ttl time.Duration) *tokenCache {
	c := &tokenCache{next: next, audiences: audiences, ttl: ttl, now: time.Now, known: map[[sha256.Size]byte]knownUser{}}
	_, _ = rand.Read(c.salt[:]) // never fails
	return c
}

// AuthenticateRequest implements authenticator.Request.
func (c *tokenCache) AuthenticateRequest(req *http.Request) (*authenticator.Response, bool, error) {
	token := soleToken(req)
	if token == "" || c.ttl <= 0 {
		return c.next.AuthenticateRequest(req)
	}
	now := c.now()
	era := c.era.Load()
	resp, ok, err := c.next.AuthenticateRequest(req)
	if err == nil && ok && c.isFor(resp) {
		c.remember(token, knownUser{resp.User, now.Add(c.ttl), era})
	}
	return resp, ok, err
}

// isFor tells responses to tokens with an identity that are meant for this server.
func (c *tokenCache) isFor(resp *authenticator.Response) bool {
	return len(resp.User.GetExtra()[user.CredentialIDKey]) > 0 && strings.HasPrefix(resp.User.GetName(), serviceaccount.ServiceAccountUsernamePrefix) &&
		(len(c.audiences) == 0 || len(resp.Audiences) == 0 || len(c.audiences.Intersect(resp.Audiences)) > 0)
}

func (c *tokenCache) remember(token string, u knownUser) {
	sum := c.sum(token)
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.holds(u) {
		return // it was proved by what does not hold any more
	}
	if len(c.known) >= maxKnownTokens {
		clear(c.known)
	}
	c.known[sum] = u
}

// configure is how the authenticators are told of another configuration.
type configure func(context.Context, *apiserver.AuthenticationConfiguration) error

// forgetAfter makes a change of the configuration forget all, also what is being authenticated at the time.
func (c *tokenCache) forgetAfter(update configure) configure {
	return func(ctx context.Context, config *apiserver.AuthenticationConfiguration) error {
		err := update(ctx, config)
		c.mu.Lock()
		defer c.mu.Unlock()
		c.era.Add(1)
		clear(c.known)
		return err
	}
}

// holds reports whether the configuration that a user was known by is the present one.
func (c *tokenCache) holds(u knownUser) bool { return u.era == c.era.Load() }

// find gives who a token is from; false where upstream has to be asked.
func (c *tokenCache) find(token string, now time.Time) (knownUser, bool) {
	if c.ttl <= 0 {
		return knownUser{}, false
	}
	sum := c.sum(token)
	c.mu.RLock()
	defer c.mu.RUnlock()
	known, ok := c.known[sum]
	return known, ok && now.Before(known.until)
}

func (c *tokenCache) sum(token string) [sha256.Size]byte {
	h := sha256.New()
	_, _ = h.Write(c.salt[:])
	_, _ = h.Write([]byte(token))
	return [sha256.Size]byte(h.Sum(nil))
}

// soleToken gives the token of a request that brings no other proof of who it is from, else nothing.
func soleToken(req *http.Request) string {
	if req.TLS != nil && len(req.TLS.PeerCertificates) > 0 {
		return ""
	}
	h := req.Header
	if len(h["Authorization"]) != 1 || h["X-Remote-User"] != nil || h["Sec-Websocket-Protocol"] != nil {
		return ""
	}
	return bearer(h["Authorization"][0])
}

// bearer gives the token of an Authorization field; empty where it is another kind of proof, or spelt as upstream may not take it.
func bearer(field string) string {
	token, ok := strings.CutPrefix(field, "Bearer ")
	if !ok || strings.ContainsAny(token, " \t") {
		return ""
	}
	return token
}
