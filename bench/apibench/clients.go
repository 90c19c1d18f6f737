package main

import (
	"context"
	"fmt"
	"net"
	"net/http"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

const (
	protobuf = "application/vnd.kubernetes.protobuf"
	asJSON   = "application/json"
)

// clients are the ways in which the server is asked.
type clients struct {
	kubernetes.Interface
	dynamic  dynamic.Interface
	config   *rest.Config
	requests []*connection
	encoder  runtime.Encoder // of the versioned kinds
}

// newClients reads the kubeconfig. Requests share the given number of connections.
func newClients(kubeconfig, encoding string, connections int) (*clients, error) {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, err
	}
	config.QPS = -1
	config.ContentType, config.AcceptContentTypes = asJSON, asJSON
	switch encoding {
	case "json":
	case "protobuf":
		config.ContentType, config.AcceptContentTypes = protobuf, protobuf+","+asJSON
	default:
		return nil, fmt.Errorf("-encoding %q is neither protobuf nor json", encoding)
	}
	c := &clients{config: config}
	if c.Interface, err = kubernetes.NewForConfig(config); err != nil {
		return nil, err
	}
	if c.dynamic, err = dynamic.NewForConfig(config); err != nil {
		return nil, err
	}
	for range max(connections, 1) {
		r, err := c.connection()
		if err != nil {
			return nil, err
		}
		c.requests = append(c.requests, r)
	}
	info, ok := runtime.SerializerInfoForMediaType(scheme.Codecs.SupportedMediaTypes(), config.ContentType)
	if !ok {
		return nil, fmt.Errorf("no serializer for %s", config.ContentType)
	}
	c.encoder = scheme.Codecs.EncoderForVersion(info.Serializer, schema.GroupVersion{Version: "v1"})
	return c, nil
}

// connection is a client that shares its connection with no other.
type connection struct {
	rest.Interface
	http *http.Client
}

// connection makes one: client-go shares connections of equal settings, and no two dialers are equal.
func (c *clients) connection() (*connection, error) {
	config := rest.CopyConfig(c.config)
	config.Dial = (&net.Dialer{}).DialContext
	config.GroupVersion = &schema.GroupVersion{}
	config.NegotiatedSerializer = scheme.Codecs.WithoutConversion()
	h, err := rest.HTTPClientFor(config)
	if err != nil {
		return nil, err
	}
	r, err := rest.UnversionedRESTClientForConfigAndClient(config, h)
	return &connection{r, h}, err
}

// connect opens the connections, as any client has one before it makes its first object: without, the first phase would begin with as many handshakes as there are workers,
// each of whom dials when there is no connection yet.
func (c *clients) connect(ctx context.Context) error {
	for _, r := range c.requests {
		if err := send(ctx, r.Get().AbsPath("/version")); err != nil {
			return err
		}
	}
	return nil
}

func (c *connection) close() { utilnet.CloseIdleConnectionsFor(c.http.Transport) }

// of is the connection of the i-th request.
func (c *clients) of(i int) rest.Interface { return c.requests[i%len(c.requests)] }

// body is an object as it goes over the line.
func (c *clients) body(obj runtime.Object) ([]byte, error) { return runtime.Encode(c.encoder, obj) }

// send does a request and does not look at the answer's body.
func send(ctx context.Context, r *rest.Request) error {
	_, err := r.DoRaw(ctx)
	return err
}
