package apiserver

import (
	"context"
	"slices"
	"strings"
	"sync"

	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/apiserver/pkg/authorization/authorizer"

	"knarr/api"
)

// maxDecisions bounds the remembered decisions; beyond it all are forgotten.
const maxDecisions = 16384

// rbacKinds are the objects on which RBAC's decisions depend.
var rbacKinds = []string{"roles", "rolebindings", "clusterroles", "clusterrolebindings"}

// decisions remembers what RBAC has decided. A decision depends on the request and the four kinds of RBAC objects only, and the
// authorizer reads those from the same tables: so what was decided at their present revisions holds, exactly, until one of
// them changes. Nodes are asked for anew each time (their authorizer looks at pods and more), as is everybody where other
// authorizers than Node and RBAC are configured.
type decisions struct {
	next     authorizer.Authorizer
	registry *api.Registry
	off      bool

	mu    sync.RWMutex
	stamp int64                    // guarded by mu: of the revisions that made is good for
	made  map[decisionKey]decision // guarded by mu
}

// decisionKey is all of a request that RBAC looks at.
type decisionKey struct {
	subject, verb, group, version, resource, subresource, namespace, name, path string
}

type decision struct {
	authorizer.Decision
	reason string
}

func newDecisions(next authorizer.Authorizer, registry *api.Registry, off bool) *decisions {
	return &decisions{next: next, registry: registry, off: off, made: map[decisionKey]decision{}}
}

// subject is what RBAC knows a user by; empty for users whose decisions are not remembered.
func (d *decisions) subject(u user.Info) string {
	groups := u.GetGroups()
	if d.off || slices.Contains(groups, user.NodesGroup) || strings.HasPrefix(u.GetName(), "system:node:") {
		return ""
	}
	return u.GetName() + "\x00" + strings.Join(groups, "\x00")
}

// now is the state of the RBAC objects: each revision only grows, so the sum is the same only while none has changed. Negative before the
// tables are open.
func (d *decisions) now() int64 {
	sum := int64(0)
	for _, resource := range rbacKinds {
		kind := d.registry.Kind(schema.GroupResource{Group: "rbac.authorization.k8s.io", Resource: resource})
		if kind == nil {
			return -1
		}
		sum += kind.Table.Revision()
	}
	return sum
}

// known is a remembered decision that still holds, else NoOpinion.
func (d *decisions) known(key decisionKey) authorizer.Decision {
	stamp := d.now()
	out, ok := d.find(key, stamp)
	if !ok && key.name != "" {
		key.name = ""
		if out, _ = d.find(key, stamp); out.Decision != authorizer.DecisionAllow {
			out.Decision = authorizer.DecisionNoOpinion
		}
	}
	return out.Decision
}

func (d *decisions) find(key decisionKey, stamp int64) (decision, bool) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if d.stamp != stamp {
		return decision{Decision: authorizer.DecisionNoOpinion}, false
	}
	out, ok := d.made[key]
	if !ok {
		out.Decision = authorizer.DecisionNoOpinion
	}
	return out, ok
}

// Authorize implements authorizer.Authorizer.
func (d *decisions) Authorize(ctx context.Context, a authorizer.Attributes) (authorizer.Decision, string, error) {
	u := a.GetUser()
	if u == nil {
		return d.next.Authorize(ctx, a)
	}
	subject := d.subject(u)
	stamp := d.now()
	if subject == "" || stamp < 0 {
		return d.next.Authorize(ctx, a)
	}
	key := decisionKey{subject: subject, verb: a.GetVerb()}
	if a.IsResourceRequest() {
		key.group, key.version, key.resource, key.subresource = a.GetAPIGroup(), a.GetAPIVersion(), a.GetResource(), a.GetSubresource()
		key.namespace, key.name = a.GetNamespace(), a.GetName()
	} else {
		key.path = a.GetPath()
	}
	if key.name != "" {
		any := key
		any.name = ""
		if known, err := d.decide(ctx, any, stamp, anyName{a}); err == nil && known.Decision == authorizer.DecisionAllow {
			return known.Decision, known.reason, nil
		}
	}
	made, err := d.decide(ctx, key, stamp, a)
	return made.Decision, made.reason, err
}

// anyName is a request about no object by name. RBAC allows what it allows of such a request for each name; what it allows for some names only, it does not
// allow of this one.
type anyName struct{ authorizer.Attributes }

// GetName implements authorizer.Attributes.
func (anyName) GetName() string { return "" }

// decide gives a decision, which is made and remembered unless it is known.
func (d *decisions) decide(ctx context.Context, key decisionKey, stamp int64, a authorizer.Attributes) (decision, error) {
	if known, ok := d.find(key, stamp); ok {
		return known, nil
	}
	out, reason, err := d.next.Authorize(ctx, a)
	made := decision{out, reason}
	if err == nil {
		d.remember(key, stamp, made)
	}
	return made, err
}

// remember keeps a decision that was made after the stamp was taken; changes in between make it forgotten at the next look.
func (d *decisions) remember(key decisionKey, stamp int64, made decision) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.stamp != stamp || len(d.made) >= maxDecisions {
		clear(d.made)
		d.stamp = stamp
	}
	d.made[key] = made
}
