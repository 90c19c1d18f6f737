package objects

import (
	"context"
	"fmt"
	"sync"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/klog/v2"
)

const (
	// tokenTimeout bounds one TokenRequest.
	tokenTimeout = 10 * time.Second
	// tokenMaxAge is the age after which a token is replaced, however long it lives.
	tokenMaxAge = 24 * time.Hour
	// tokenLifeShare is the share of its life after which a token is replaced,
	// in percent (KEP-1205).
	tokenLifeShare = 80
	// tokenRetry is the pause before a failed replacement is tried again.
	tokenRetry = 30 * time.Second
)

// Tokens requests bound service account tokens for pods and keeps them until
// they are due for replacement. Safe for concurrent use.
type Tokens struct {
	client kubernetes.Interface
	ctx    context.Context
	due    func(uid types.UID)

	mu    sync.Mutex
	byPod map[types.UID]map[string]*token
}

type token struct {
	request *authenticationv1.TokenRequest
	renewAt time.Time
	timer   *time.Timer
}

// NewTokens returns Tokens that call due, from a goroutine of a timer, when a
// token of a pod shall be replaced: the pod's volumes are then to be written again.
func NewTokens(ctx context.Context, client kubernetes.Interface, due func(uid types.UID)) *Tokens {
	return &Tokens{client: client, ctx: ctx, due: due, byPod: map[types.UID]map[string]*token{}}
}

// Get returns a token for a service account, from memory while it is fresh. A
// token that cannot be replaced is returned as long as it is valid.
func (t *Tokens) Get(namespace, name string, tr *authenticationv1.TokenRequest) (*authenticationv1.TokenRequest, error) {
	uid, k := boundPod(tr), tokenKey(namespace, name, tr)
	t.mu.Lock()
	cached := t.byPod[uid][k]
	t.mu.Unlock()
	now := time.Now()
	if cached != nil && now.Before(cached.renewAt) {
		return cached.request, nil
	}
	ctx, cancel := context.WithTimeout(t.ctx, tokenTimeout)
	defer cancel()
	issued, err := t.client.CoreV1().ServiceAccounts(namespace).CreateToken(ctx, name, tr, metav1.CreateOptions{})
	if err != nil {
		if cached != nil && now.Before(cached.request.Status.ExpirationTimestamp.Time) {
			klog.Background().Error(err, "Token not replaced, keeping the present one", "namespace", namespace, "serviceAccount", name)
			t.schedule(uid, cached, now.Add(tokenRetry))
			return cached.request, nil
		}
		return nil, fmt.Errorf("failed to fetch token: %w", err)
	}
	t.keep(uid, k, issued, now)
	return issued, nil
}

func (t *Tokens) keep(uid types.UID, k string, issued *authenticationv1.TokenRequest, now time.Time) {
	fresh := &token{request: issued}
	t.mu.Lock()
	if t.byPod[uid] == nil {
		t.byPod[uid] = map[string]*token{}
	}
	if old := t.byPod[uid][k]; old != nil && old.timer != nil {
		old.timer.Stop()
	}
	t.byPod[uid][k] = fresh
	t.mu.Unlock()
	t.schedule(uid, fresh, renewal(issued, now))
}

// renewal returns when a token issued now is to be replaced.
func renewal(issued *authenticationv1.TokenRequest, now time.Time) time.Time {
	life := issued.Status.ExpirationTimestamp.Sub(now)
	return now.Add(min(life*tokenLifeShare/100, tokenMaxAge))
}

func (t *Tokens) schedule(uid types.UID, tok *token, at time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	tok.renewAt = at
	if tok.timer != nil {
		tok.timer.Stop()
	}
	tok.timer = time.AfterFunc(time.Until(at), func() {
		if t.ctx.Err() == nil {
			t.due(uid)
		}
	})
}

// Forget drops the tokens of a pod.
func (t *Tokens) Forget(uid types.UID) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, tok := range t.byPod[uid] {
		tok.timer.Stop()
	}
	delete(t.byPod, uid)
}

// Close stops all timers.
func (t *Tokens) Close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, toks := range t.byPod {
		for _, tok := range toks {
			tok.timer.Stop()
		}
	}
	t.byPod = map[types.UID]map[string]*token{}
}

func boundPod(tr *authenticationv1.TokenRequest) types.UID {
	if ref := tr.Spec.BoundObjectRef; ref != nil {
		return ref.UID
	}
	return ""
}

func tokenKey(namespace, name string, tr *authenticationv1.TokenRequest) string {
	var seconds int64
	if tr.Spec.ExpirationSeconds != nil {
		seconds = *tr.Spec.ExpirationSeconds
	}
	return fmt.Sprintf("%s/%s/%q/%d/%v", namespace, name, tr.Spec.Audiences, seconds, tr.Spec.BoundObjectRef)
}
