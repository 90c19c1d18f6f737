package client

import (
	"net/http"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/client-go/rest"
)

// inProcessHost is the host of in-process requests. It is never resolved nor dialled.
const inProcessHost = "http://knarr.internal"

// Config returns a rest.Config whose requests are answered by handler, in this process, as user. Every client that client-go can build
// works on it (typed, dynamic, metadata, discovery, scale); built-in types travel as protobuf. There is no client-side rate limit: the
// pipeline's own flow control is the limit. HTTP upgrades (exec, attach, port-forward) are refused.
//
// The result may be changed by the caller (UserAgent, ContentType), as with any rest.Config.
func Config(handler http.Handler, u user.Info) *rest.Config {
	return &rest.Config{
		Host:      inProcessHost,
		Transport: newTransport(handler, u),
		UserAgent: "knarr/" + u.GetName(),
		QPS:       -1,
		ContentConfig: rest.ContentConfig{
			ContentType:        runtime.ContentTypeProtobuf,
			AcceptContentTypes: runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON,
		},
	}
}
