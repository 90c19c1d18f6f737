package apiserver

import (
	"net/http"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/sets"
	"k8s.io/apimachinery/pkg/util/waitgroup"
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

// longRunning tells requests that have no deadline and do not count against the limits.
var longRunning = genericfilters.BasicLongRunningRequestCheck(
	sets.NewString("watch", "proxy"),
	sets.NewString("attach", "exec", "proxy", "log", "portforward"),
)

func requestInfoResolver() *apirequest.RequestInfoFactory {
	return &apirequest.RequestInfoFactory{
		APIPrefixes:          sets.NewString("api", "apis"),
		GrouplessAPIPrefixes: sets.NewString("api"),
	}
}

// newChain wraps the router in the filters that every request passes, outermost last.
func newChain(h http.Handler, id *identity, codecs runtime.NegotiatedSerializer, running *waitgroup.SafeWaitGroup) http.Handler {
	h = filters.WithAuthorization(h, id.authorizer, codecs)
	h = genericfilters.WithMaxInFlightLimit(h, MaxReadsInFlight, MaxWritesInFlight, longRunning)
	h = impersonation.WithConstrainedImpersonation(h, id.authorizer, codecs)
	h = filters.WithAudit(h, nil, nil, longRunning)
	failed := filters.WithFailedAuthenticationAudit(filters.Unauthorized(codecs), nil, nil)
	h = filters.WithAuthentication(h, id.authenticator, failed, id.audiences, id.requestHeader)
	h = filters.WithWarningRecorder(h)
	h = filters.WithRequestDeadline(h, nil, nil, longRunning, codecs, RequestTimeout)
	h = genericfilters.WithWaitGroup(h, longRunning, running)
	h = filters.WithCacheControl(h)
	h = filters.WithLatencyTrackers(h)
	h = filters.WithRequestInfo(h, requestInfoResolver())
	h = filters.WithRequestReceivedTimestamp(h)
	h = genericfilters.WithPanicRecovery(h, requestInfoResolver())
	return filters.WithAuditInit(h)
}
