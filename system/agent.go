package system

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"

	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"knarr/cli"
	"knarr/system/pki"
)

// RunAgent implements cli.System.
func (s *System) RunAgent(ctx context.Context, config cli.AgentConfig) error {
	if err := config.Validate(); err != nil {
		return err
	}
	if !config.NodeIP.IsValid() {
		config.NodeIP = addressTowards(config.Server)
	}
	token, err := pki.ParseToken(config.Token)
	if err != nil {
		return err
	}
	identity, err := pki.Join(ctx, pki.JoinOptions{
		Server: config.Server, Token: token, Node: config.NodeName, Addresses: []string{config.NodeIP.String()},
		Dir: cli.NodeTLSDir(config.Dir, config.NodeName),
	})
	if err != nil {
		return err
	}
	var cluster clusterInfo
	if err := json.Unmarshal(identity.Cluster(), &cluster); err != nil {
		return fmt.Errorf("the server's description of the cluster: %w", err)
	}
	return runAgent(ctx, config, identity, cluster)
}

func runAgent(ctx context.Context, config cli.AgentConfig, identity *pki.NodeIdentity, cluster clusterInfo) error {
	client := agentClient(config.Server, identity)
	kube, err := kubernetes.NewForConfig(client)
	if err != nil {
		return err
	}
	g := newGroup(ctx)
	defer g.cancel(nil)
	factory := informers.NewSharedInformerFactory(kube, 0)
	n, err := newNode(g.ctx, nodeConfig{
		cluster: cluster, clusterName: config.Name, dir: config.Dir, name: config.NodeName, ip: config.NodeIP,
		gateway: gatewayOf(config, cluster), port: config.KubeletPort, shim: config.ShimPath, registries: config.RegistryConfigPath,
		client: client, informers: factory, serving: identity.ServingTLS(), registered: config.Ready, log: slog.Default(),
	})
	if err != nil {
		return err
	}
	g.background(func(ctx context.Context) {
		identity.Maintain(ctx, func(err error) { slog.Error("the node's certificates are not renewed", "err", err) })
	})
	if err := n.start(g); err != nil {
		g.fail(err)
	}
	if err := keepTunnels(g, config, identity, n); err != nil {
		g.fail(err)
	}
	factory.Start(g.ctx.Done())
	g.background(func(ctx context.Context) { lighten(ctx, pace{}) })
	err = g.wait()
	factory.Shutdown()
	return errors.Join(err, n.close(ctx))
}

// agentClient is the node's own client of the API.
func agentClient(server string, identity *pki.NodeIdentity) *rest.Config {
	transport := &http.Transport{
		DialContext:     (&net.Dialer{Timeout: dialTimeout}).DialContext,
		TLSClientConfig: identity.ClientTLS(),
		// A server that vanished is noticed by its silence; see k8s.io/apimachinery/pkg/util/net.
		ForceAttemptHTTP2: true,
		HTTP2:             &http.HTTP2Config{SendPingTimeout: readIdleTimeout, PingTimeout: pingTimeout},
	}
	return &rest.Config{
		Host:      server,
		Transport: transport,
		QPS:       -1,
		UserAgent: "knarr-agent",
		ContentConfig: rest.ContentConfig{
			ContentType:        runtime.ContentTypeProtobuf,
			AcceptContentTypes: runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON,
		},
	}
}

// gatewayOf is the server's machine where the node is a namespace of it, and nothing elsewhere.
func gatewayOf(config cli.AgentConfig, cluster clusterInfo) netip.Addr {
	if !cluster.NodeCIDR.Contains(config.NodeIP) {
		return netip.Addr{}
	}
	u, err := url.Parse(config.Server)
	if err != nil {
		return netip.Addr{}
	}
	gateway, _ := netip.ParseAddr(u.Hostname())
	return gateway
}

// addressTowards is this machine's address on the way to the server.
func addressTowards(server string) netip.Addr {
	u, err := url.Parse(server)
	if err != nil {
		return hostAddress()
	}
	c, err := net.Dial("udp", net.JoinHostPort(u.Hostname(), "9")) // sends nothing: it asks the kernel for the route
	if err != nil {
		return hostAddress()
	}
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap()
}
