package apiserver

import (
	"net/http"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/apiserver/pkg/endpoints/filters"
	"k8s.io/apiserver/pkg/endpoints/filters/impersonation"
	apirequest "k8s.io/apiserver/pkg/endpoints/request"
	genericfilters "k8s.io/apiserver/pkg/server/filters"
	utilcompatibility "k8s.io/apiserver/pkg/util/compatibility"
	basecompatibility "k8s.io/component-base/compatibility"
)

// serverID names this server where upstream wants an identity of one among several.
const serverID = "knarr"

// effectiveVersion is the Kubernetes version whose behaviour the pipeline has.
func effectiveVersion() basecompatibility.EffectiveVersion {
	return utilcompatibility.DefaultComponentGlobalsRegistry.EffectiveVersionFor(basecompatibility.DefaultKubeComponent)
}

// TunnelPath is where nodes offer a connection on which this server reaches them: see Config.Tunnels.
const TunnelPath = "/knarr/v1/tunnel"

// longRunning tells requests that have no deadline and do not count against the limits.
func longRunning(req *http.Request, info *apirequest.RequestInfo) bool {
	return upstreamLongRunning(req, info) || isTunnel(info)
}

var upstreamLongRunning = genericfilters.BasicLongRunningRequestCheck(
	sets.NewString("watch", "proxy"),
	sets.NewString("attach", "exec", "proxy", "log", "portforward"),
)

func isTunnel(info *apirequest.RequestInfo) bool {
	return !info.IsResourceRequest && info.Path == TunnelPath
}

// tunnels takes the requests of TunnelPath out of the chain. It stands before impersonation: only who has a node's own
// credentials is the node.
func tunnels(h, taken http.Handler) http.Handler {
	if taken == nil {
		return h
	}
	return http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if info, ok := apirequest.RequestInfoFrom(req.Context()); ok && isTunnel(info) {
			taken.ServeHTTP(w, req)
			return
		}
		h.ServeHTTP(w, req)
	})
}

func requestInfoResolver() *apirequest.RequestInfoFactory {
	return &apirequest.RequestInfoFactory{
		APIPrefixes:          sets.NewString("api", "apis"),
		GrouplessAPIPrefixes: sets.NewString("api"),
	}
}

// chain is what the filters are made of.
type chain struct {
	config   *Config
	id       *identity
	flow     *flowControl
	auditing auditing
	end      *shutdown
}

// inProcess tells requests that no socket brought.
func (c *chain) inProcess(req *http.Request) bool {
	_, ok := c.config.InProcessUser(req.Context())
	return ok
}

// wrap puts a handler behind the filters that every request passes, outermost last. The order is upstream's
// (DefaultBuildHandlerChain in k8s.io/apiserver/pkg/server/config.go).
func (c *chain) wrap(h http.Handler, codecs runtime.NegotiatedSerializer) http.Handler {
	a := &c.auditing
	h = filters.WithAuthorization(h, c.id.authorizer, codecs)
	h = c.flow.wrap(h, c.inProcess)
	h = impersonation.WithConstrainedImpersonation(h, c.id.authorizer, codecs)
	h = tunnels(h, c.config.Tunnels)
	h = filters.WithAudit(h, a.sink(), a.rules, longRunning)
	failed := filters.WithFailedAuthenticationAudit(filters.Unauthorized(codecs), a.sink(), a.rules)
	h = filters.WithAuthentication(h, c.id.authenticator, failed, c.id.audiences, c.id.requestHeader)
	h = filters.WithWarningRecorder(h)
	h = withTimeout(h, c.config.Registry)
	h = filters.WithRequestDeadline(h, a.sink(), a.rules, longRunning, codecs, RequestTimeout)
	h = c.end.wrap(h)
	h = withConnectionDeadlines(h, connectionLimits{RequestTimeout + answerGrace, stalledWriteTimeout}, c.inProcess)
	h = filters.WithCacheControl(h)
	h = filters.WithLatencyTrackers(h)
	h = filters.WithRequestInfo(h, requestInfoResolver())
	h = filters.WithRequestReceivedTimestamp(h)
	h = genericfilters.WithPanicRecovery(h, requestInfoResolver())
	return filters.WithAuditInit(h)
}
