package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

// Addresses of the upstream cluster.
const (
	upstreamPort = "6443"
	etcdURL      = "http://127.0.0.1:2379"
	etcdPeerURL  = "http://127.0.0.1:2380"
	serviceIP    = "10.96.0.1"
	serviceRange = "10.96.0.0/12"
	podRange     = "10.244.0.0/16"
	nodePods     = "10.244.0.0/24"
	pluginDir    = "/usr/lib/cni" // of Debian's containernetworking-plugins
	pauseImage   = "knarr.example/pause:1"
	runtimeSock  = "/run/containerd/containerd.sock"
	socketWait   = 20 * time.Second
)

// upstream is a whole node of upstream Kubernetes, set up as kubeadm does it, its control plane as plain processes. Its
// store speaks without TLS, which is less work than kubeadm's.
type upstream struct {
	plan
	pki string
	run daemons
}

func newUpstream(p plan) (side, error) {
	u := &upstream{plan: p, pki: filepath.Join(p.Dir, "pki")}
	return u, errors.Join(u.certificates(), u.files())
}

func (u *upstream) key(name string) string { return filepath.Join(u.pki, name) }

// certificates makes all keys before the clock starts; knarr makes its own while it starts.
func (u *upstream) certificates() error {
	if err := os.MkdirAll(u.pki, 0o700); err != nil {
		return err
	}
	ca, err := newAuthority(u.pki, "ca")
	if err != nil {
		return err
	}
	front, err := newAuthority(u.pki, "front-proxy-ca")
	if err != nil {
		return err
	}
	accounts, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	server := "https://" + machineIP + ":" + upstreamPort
	names := []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"}
	return errors.Join(
		writeKey(u.key("accounts.key"), accounts),
		ca.issue("server", "kube-apiserver", "", names, "127.0.0.1", machineIP, serviceIP),
		ca.issue("to-kubelet", "kube-apiserver-kubelet-client", "system:masters", nil),
		front.issue("front-proxy", "front-proxy-client", "", nil),
		ca.kubeconfig("admin", "kubernetes-admin", "system:masters", server),
		ca.kubeconfig("controllers", "system:kube-controller-manager", "", server),
		ca.kubeconfig("scheduler", "system:kube-scheduler", "", server),
		ca.kubeconfig("kubelet", "system:node:"+nodeName, "system:nodes", server),
	)
}

// files writes the configuration that does not fit into flags.
func (u *upstream) files() error {
	secret := make([]byte, 32)
	if _, err := rand.Read(secret); err != nil {
		return err
	}
	cni := filepath.Join(u.Dir, "cni")
	if err := os.MkdirAll(cni, 0o755); err != nil {
		return err
	}
	var errs []error
	for file, content := range map[string]string{
		u.key("encryption.yaml"): fmt.Sprintf(`apiVersion: apiserver.config.k8s.io/v1
kind: EncryptionConfiguration
resources:
- resources: [secrets]
  providers:
  - secretbox: {keys: [{name: key1, secret: %s}]}
  - identity: {}
`, base64.StdEncoding.EncodeToString(secret)),
		filepath.Join(u.Dir, "kubelet.yaml"): fmt.Sprintf(`apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication:
  anonymous: {enabled: false}
  webhook: {enabled: true}
  x509: {clientCAFile: %s}
authorization: {mode: Webhook}
cgroupDriver: cgroupfs
failCgroupV1: false
failSwapOn: false
oomScoreAdj: 0
clusterDomain: cluster.local
containerRuntimeEndpoint: unix://%s
`, u.key("ca.crt"), runtimeSock),
		filepath.Join(u.Dir, "containerd.toml"): fmt.Sprintf(`version = 2
root = %q
state = "/run/containerd"
[grpc]
  address = %q
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = %q
  restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = %q
  conf_dir = %q
`, filepath.Join(u.Dir, "containerd"), runtimeSock, pauseImage, pluginDir, cni),
		filepath.Join(cni, "10-bridge.conflist"): fmt.Sprintf(`{"cniVersion": "1.0.0", "name": "bridge", "plugins": [{"type": "bridge", "bridge": "cni0",
"isGateway": true, "hairpinMode": true, "ipam": {"type": "host-local", "ranges": [[{"subnet": %q}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}
`, nodePods),
	} {
		errs = append(errs, os.WriteFile(file, []byte(content), 0o600))
	}
	return errors.Join(errs...)
}

func (u *upstream) add(program string, args ...string) error {
	path := filepath.Join(u.Bin, program)
	if _, err := os.Stat(path); err != nil {
		path = program // of the distribution
	}
	return u.run.add(filepath.Join(u.Dir, filepath.Base(program)+".log"), path, args...)
}

func (u *upstream) start() error {
	return errors.Join(
		u.add("containerd", "--config", filepath.Join(u.Dir, "containerd.toml")),
		u.add("etcd", "--data-dir", filepath.Join(u.Dir, "etcd"), "--listen-client-urls", etcdURL, "--advertise-client-urls", etcdURL,
			"--listen-peer-urls", etcdPeerURL, "--initial-advertise-peer-urls", etcdPeerURL, "--initial-cluster", "default="+etcdPeerURL),
		u.add("kube-apiserver", "--etcd-servers", etcdURL, "--secure-port", upstreamPort, "--advertise-address", machineIP,
			"--tls-cert-file", u.key("server.crt"), "--tls-private-key-file", u.key("server.key"), "--client-ca-file", u.key("ca.crt"),
			"--authorization-mode", "Node,RBAC", "--enable-admission-plugins", "NodeRestriction", "--enable-bootstrap-token-auth",
			"--allow-privileged", "--service-cluster-ip-range", serviceRange,
			"--service-account-issuer", "https://kubernetes.default.svc.cluster.local",
			"--service-account-key-file", u.key("accounts.key"), "--service-account-signing-key-file", u.key("accounts.key"),
			"--kubelet-client-certificate", u.key("to-kubelet.crt"), "--kubelet-client-key", u.key("to-kubelet.key"),
			"--encryption-provider-config", u.key("encryption.yaml"),
			"--requestheader-client-ca-file", u.key("front-proxy-ca.crt"), "--requestheader-allowed-names", "front-proxy-client",
			"--requestheader-username-headers", "X-Remote-User", "--requestheader-group-headers", "X-Remote-Group",
			"--requestheader-extra-headers-prefix", "X-Remote-Extra-",
			"--proxy-client-cert-file", u.key("front-proxy.crt"), "--proxy-client-key-file", u.key("front-proxy.key")),
	)
}

// join starts what gives up where the API does not answer, and the kubelet.
func (u *upstream) join() error {
	controllers, scheduler := u.key("controllers.kubeconfig"), u.key("scheduler.kubeconfig")
	return errors.Join(
		u.add("kubelet", "--config", filepath.Join(u.Dir, "kubelet.yaml"), "--kubeconfig", u.key("kubelet.kubeconfig"),
			"--hostname-override", nodeName, "--node-ip", machineIP),
		u.add("kube-controller-manager", "--kubeconfig", controllers, "--authentication-kubeconfig", controllers, "--authorization-kubeconfig", controllers,
			"--controllers", "*,bootstrapsigner,tokencleaner", "--use-service-account-credentials", "--service-account-private-key-file", u.key("accounts.key"),
			"--root-ca-file", u.key("ca.crt"), "--cluster-signing-cert-file", u.key("ca.crt"), "--cluster-signing-key-file", u.key("ca.key"),
			"--client-ca-file", u.key("ca.crt"), "--requestheader-client-ca-file", u.key("front-proxy-ca.crt"),
			"--allocate-node-cidrs", "--cluster-cidr", podRange, "--service-cluster-ip-range", serviceRange, "--bind-address", "127.0.0.1"),
		u.add("kube-scheduler", "--kubeconfig", scheduler, "--authentication-kubeconfig", scheduler, "--authorization-kubeconfig", scheduler,
			"--bind-address", "127.0.0.1"),
	)
}

// images packs pause and busybox and imports them into containerd.
func (u *upstream) images(ctx context.Context) error {
	if err := awaitSocket(runtimeSock); err != nil {
		return err
	}
	file := filepath.Join(u.Dir, "images.tar")
	if err := packImages(ctx, u.Dir, filepath.Join(u.Bin, "pause"), file); err != nil {
		return err
	}
	out, err := exec.CommandContext(ctx, "ctr", "-n", "k8s.io", "images", "import", file).CombinedOutput()
	if err != nil {
		return fmt.Errorf("ctr images import: %w: %s", err, out)
	}
	return nil
}

func awaitSocket(path string) error {
	for end := time.Now().Add(socketWait); ; time.Sleep(20 * time.Millisecond) {
		c, err := net.Dial("unix", path)
		if err == nil {
			return c.Close()
		}
		if time.Now().After(end) {
			return err
		}
	}
}

func (u *upstream) stop() error { return u.run.stop() }
