package runtime

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"sync"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"knarr/node/shim"
	"knarr/node/sweep"
)

const (
	// shmOptions are the mount options of a pod's /dev/shm.
	shmOptions  = "mode=1777,size=65536k"
	pauseSuffix = "-pause"
	// pauseUser runs the pause process, which needs no rights.
	pauseUser = 65535
	// pauseOOMScore keeps the pause process from being killed before containers.
	pauseOOMScore = -998
)

// sandbox is a pod's frame: its namespaces, its network and its files.
type sandbox struct {
	id  string
	dir string
	// op serialises Stop and Remove.
	op sync.Mutex

	mu     sync.Mutex
	config *runtimeapi.PodSandboxConfig
	rec    sandboxRecord
}

func pauseOfSandbox(id string) string { return id + pauseSuffix }
func sandboxOfPause(id string) string {
	if trimmed, ok := strings.CutSuffix(id, pauseSuffix); ok {
		return trimmed
	}
	return ""
}

func (s *sandbox) nsDir() string             { return filepath.Join(s.dir, "ns") }
func (s *sandbox) nsPath(name string) string { return filepath.Join(s.dir, "ns", name) }
func (s *sandbox) file(name string) string   { return filepath.Join(s.dir, name) }

func (s *sandbox) record() sandboxRecord {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.rec
}

func (s *sandbox) options() *runtimeapi.NamespaceOption {
	return s.config.GetLinux().GetSecurityContext().GetNamespaceOptions()
}

// update changes the record and writes it. All that changes after the creation
// is void after a restart of the machine, so this need not be durable.
func (s *sandbox) update(change func(*sandboxRecord)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(&s.rec)
	return save(s.dir, sandboxFile, &s.rec, false)
}

// RunPodSandbox implements internalapi.PodSandboxManager.
func (r *Runtime) RunPodSandbox(ctx context.Context, config *runtimeapi.PodSandboxConfig, handler string) (string, error) {
	if handler != "" {
		return "", invalid("runtime handler %q does not exist: knarr has one, without a name", handler)
	}
	meta := config.GetMetadata()
	if meta.GetName() == "" || meta.GetNamespace() == "" || meta.GetUid() == "" {
		return "", invalid("sandbox configuration without name, namespace or uid")
	}
	r.expectStart()
	s, err := r.newSandbox(config)
	if err != nil {
		return "", rpcError(err)
	}
	if err := r.buildSandbox(ctx, s); err != nil {
		clean, cancel := cleanupContext(ctx)
		defer cancel()
		if cerr := r.demolish(clean, s); cerr != nil {
			r.log.Warn("clean up after a failed sandbox", "sandbox", s.id, "error", cerr)
		} else if cerr := os.RemoveAll(s.dir); cerr != nil {
			r.log.Warn("clean up after a failed sandbox", "sandbox", s.id, "error", cerr)
		}
		return "", rpcError(fmt.Errorf("run sandbox of pod %s/%s: %w", meta.Namespace, meta.Name, err))
	}
	r.mu.Lock()
	r.sandboxes[s.id] = s
	r.mu.Unlock()
	r.emitSandbox(s, runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT)
	r.emitSandbox(s, runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT)
	return s.id, nil
}

// newSandbox makes the directory and the record.
func (r *Runtime) newSandbox(config *runtimeapi.PodSandboxConfig) (*sandbox, error) {
	data, err := encode(config)
	if err != nil {
		return nil, err
	}
	id := newID()
	s := &sandbox{id: id, dir: filepath.Join(r.podsDir(), id), config: config}
	opts := s.options()
	s.rec = sandboxRecord{
		ID: id, CreatedAt: time.Now().UnixNano(), Config: data, BootID: r.boot,
		CgroupParent: config.GetLinux().GetCgroupParent(),
		UserNS:       opts.GetUsernsOptions().GetMode() == runtimeapi.NamespaceMode_POD && opts.GetUsernsOptions() != nil,
		HostNetwork:  opts.GetNetwork() == runtimeapi.NamespaceMode_NODE,
		Hostname:     config.GetHostname(),
	}
	s.rec.NetworkUp = r.opts.Network != nil && !s.rec.HostNetwork
	if s.rec.CgroupParent == "" {
		s.rec.CgroupParent = filepath.Join(r.opts.CgroupParent, "pod"+config.GetMetadata().GetUid())
		s.rec.OwnCgroup = true
	}
	if s.rec.Hostname == "" || s.rec.HostNetwork {
		if s.rec.Hostname, err = os.Hostname(); err != nil {
			return nil, err
		}
	}
	if err := os.Mkdir(s.dir, 0o711); err != nil {
		return nil, err
	}
	return s, save(s.dir, sandboxFile, &s.rec, true)
}

// buildSandbox makes everything that the record announces.
func (r *Runtime) buildSandbox(ctx context.Context, s *sandbox) error {
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return s.writeFiles() })
	g.Go(func() error { return s.mountShm() })
	var ips []string
	pausePID := 0
	g.Go(func() error {
		if err := r.plan(s).pin(s.nsDir(), r.opts.ShimPath); err != nil {
			return err
		}
		if s.options().GetPid() == runtimeapi.NamespaceMode_POD {
			pid, err := r.startPause(gctx, s)
			if err != nil {
				return err
			}
			pausePID = pid
		}
		var err error
		ips, err = r.connect(gctx, s)
		return err
	})
	if err := g.Wait(); err != nil {
		return err
	}
	return s.update(func(rec *sandboxRecord) {
		rec.Ready, rec.IPs, rec.PausePID = true, ips, pausePID
	})
}

func (r *Runtime) plan(s *sandbox) nsPlan {
	opts := s.options()
	p := nsPlan{
		net:      opts.GetNetwork() != runtimeapi.NamespaceMode_NODE,
		ipc:      opts.GetIpc() != runtimeapi.NamespaceMode_NODE,
		hostname: s.rec.Hostname,
		sysctls:  map[string]string{},
	}
	p.uts = p.net
	if s.rec.UserNS {
		p.user = &idMap{uids: opts.GetUsernsOptions().GetUids(), gids: opts.GetUsernsOptions().GetGids()}
	}
	if p.net && p.user == nil {
		// As containerd does by default: pods may use low ports and ping.
		p.sysctls["net.ipv4.ip_unprivileged_port_start"] = "0"
		p.sysctls["net.ipv4.ping_group_range"] = "0 2147483647"
	}
	for key, value := range s.config.GetLinux().GetSysctls() {
		p.sysctls[key] = value
	}
	return p
}

func (r *Runtime) networkRequest(s *sandbox) NetworkRequest {
	meta := s.config.GetMetadata()
	return NetworkRequest{
		SandboxID: s.id, Namespace: meta.GetNamespace(), Name: meta.GetName(), UID: meta.GetUid(),
		NetnsPath: s.nsPath("net"), PortMappings: s.config.GetPortMappings(),
		Labels: s.config.GetLabels(), Annotations: s.config.GetAnnotations(),
	}
}

// connect gives the sandbox its network.
func (r *Runtime) connect(ctx context.Context, s *sandbox) ([]string, error) {
	if !s.rec.NetworkUp {
		return nil, nil
	}
	st, err := r.opts.Network.SetUp(ctx, r.networkRequest(s))
	if err != nil {
		return nil, fmt.Errorf("set up the pod's network: %w", err)
	}
	var ips []string
	for _, ip := range st.IPs {
		ips = append(ips, ip.String())
	}
	return ips, nil
}

func (s *sandbox) mountShm() error {
	if s.options().GetIpc() == runtimeapi.NamespaceMode_NODE {
		return nil
	}
	path := s.file("shm")
	if err := os.Mkdir(path, 0o700); err != nil {
		return err
	}
	opts := shmOptions
	if s.rec.UserNS {
		opts += fmt.Sprintf(",uid=%d,gid=%d", s.options().GetUsernsOptions().GetUids()[0].HostId, s.options().GetUsernsOptions().GetGids()[0].HostId)
	}
	if err := unix.Mount("shm", path, "tmpfs", unix.MS_NOEXEC|unix.MS_NOSUID|unix.MS_NODEV, opts); err != nil {
		return &os.PathError{Op: "mount tmpfs on", Path: path, Err: err}
	}
	return nil
}

// writeFiles makes what containers see at /etc/resolv.conf, hostname and hosts.
func (s *sandbox) writeFiles() error {
	var resolv []byte
	if dns := s.config.GetDnsConfig(); dns != nil {
		resolv = resolvConf(dns)
	} else if data, err := os.ReadFile("/etc/resolv.conf"); err == nil {
		resolv = data
	}
	hosts, _ := os.ReadFile("/etc/hosts")
	for name, content := range map[string][]byte{
		"resolv.conf": resolv, "hostname": []byte(s.rec.Hostname + "\n"), "hosts": hosts,
	} {
		if err := os.WriteFile(s.file(name), content, 0o644); err != nil {
			return err
		}
	}
	return nil
}

func resolvConf(dns *runtimeapi.DNSConfig) []byte {
	var b strings.Builder
	if len(dns.Searches) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(dns.Searches, " "))
	}
	for _, server := range dns.Servers {
		fmt.Fprintf(&b, "nameserver %s\n", server)
	}
	if len(dns.Options) > 0 {
		fmt.Fprintf(&b, "options %s\n", strings.Join(dns.Options, " "))
	}
	return []byte(b.String())
}

// startPause starts the first process of the pod's PID namespace.
func (r *Runtime) startPause(ctx context.Context, s *sandbox) (int, error) {
	adj := pauseOOMScore
	spec := &specs.Spec{
		Version: specs.Version,
		Root:    &specs.Root{Path: s.file("pause"), Readonly: true},
		Process: &specs.Process{
			Cwd: "/", User: specs.User{UID: pauseUser, GID: pauseUser}, NoNewPrivileges: true,
			Capabilities: &specs.LinuxCapabilities{}, OOMScoreAdj: &adj,
		},
		Mounts: []specs.Mount{procMount(), devMount()},
		Linux: &specs.Linux{
			CgroupsPath: filepath.Join(s.rec.CgroupParent, s.id),
			Resources:   &specs.LinuxResources{Devices: denyAllDevices()},
		},
	}
	spec.Linux.Namespaces = append(s.namespaces(), specs.LinuxNamespace{Type: specs.PIDNamespace})
	st, _, err := r.shim.Run(ctx, pauseOfSandbox(s.id), &shim.StartRequest{Spec: spec, Pause: true})
	if err != nil {
		return 0, fmt.Errorf("start the pause process: %w", err)
	}
	return st.PID, nil
}

// namespaces lists what every container of the sandbox joins, and a mount
// namespace of its own.
func (s *sandbox) namespaces() []specs.LinuxNamespace {
	list := []specs.LinuxNamespace{{Type: specs.MountNamespace}}
	opts := s.options()
	if opts.GetNetwork() != runtimeapi.NamespaceMode_NODE {
		list = append(list,
			specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: s.nsPath("net")},
			specs.LinuxNamespace{Type: specs.UTSNamespace, Path: s.nsPath("uts")})
	}
	if opts.GetIpc() != runtimeapi.NamespaceMode_NODE {
		list = append(list, specs.LinuxNamespace{Type: specs.IPCNamespace, Path: s.nsPath("ipc")})
	}
	if s.rec.UserNS { // libcontainer takes the mapping from the namespace
		list = append(list, specs.LinuxNamespace{Type: specs.UserNamespace, Path: s.nsPath("user")})
	}
	return list
}

// StopPodSandbox implements internalapi.PodSandboxManager.
func (r *Runtime) StopPodSandbox(ctx context.Context, id string) error {
	s, err := r.findSandbox(id)
	if err != nil {
		return nil // stopping is idempotent, also after the removal
	}
	return rpcError(r.stopSandbox(ctx, s))
}

func (r *Runtime) stopSandbox(ctx context.Context, s *sandbox) error {
	s.op.Lock()
	defer s.op.Unlock()
	rec := s.record()
	if rec.TornDown {
		return nil
	}
	// From here on nothing starts in the sandbox; what is being started is waited
	// for and killed.
	if err := s.update(func(rec *sandboxRecord) { rec.Ready = false }); err != nil {
		return err
	}
	g, gctx := errgroup.WithContext(ctx)
	for _, c := range r.containersOf(s.id) {
		g.Go(func() error {
			c.op.Lock()
			defer c.op.Unlock()
			return r.kill(gctx, c)
		})
	}
	if err := g.Wait(); err != nil {
		return fmt.Errorf("stop the containers of sandbox %s: %w", s.id, err)
	}
	if err := r.demolish(ctx, s); err != nil {
		return fmt.Errorf("stop sandbox %s: %w", s.id, err)
	}
	if err := s.update(func(rec *sandboxRecord) { rec.Ready, rec.TornDown, rec.PausePID = false, true, 0 }); err != nil {
		return err
	}
	r.emitSandbox(s, runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT)
	return nil
}

// demolish undoes buildSandbox, however far that came. It is idempotent.
func (r *Runtime) demolish(ctx context.Context, s *sandbox) error {
	var errs []error
	if err := r.shim.Delete(ctx, pauseOfSandbox(s.id), true); err != nil && !shimNotFound(err) {
		errs = append(errs, err)
	}
	if r.opts.Network != nil && s.record().NetworkUp {
		if err := r.opts.Network.TearDown(ctx, r.networkRequest(s)); err != nil {
			errs = append(errs, fmt.Errorf("tear down the pod's network: %w", err))
		}
	}
	if len(errs) > 0 {
		return errors.Join(errs...)
	}
	errs = append(errs, unpin(s.nsDir()), unmount(s.file("shm")), os.RemoveAll(s.file("shm")), os.RemoveAll(s.file("pause")))
	if s.rec.OwnCgroup {
		removePodCgroup(s.rec.CgroupParent)
	}
	return errors.Join(errs...)
}

// removePodCgroup removes the pod's directories in every hierarchy; those that
// another sandbox of the pod still uses stay.
func removePodCgroup(path string) {
	dirs, _ := filepath.Glob("/sys/fs/cgroup/*" + path)
	for _, dir := range append(dirs, "/sys/fs/cgroup"+path) {
		_ = unix.Rmdir(dir)
	}
}

// scrapSandbox removes a sandbox's directory that has no record.
func (r *Runtime) scrapSandbox(dir string) error {
	return errors.Join(unpin(filepath.Join(dir, "ns")), unmount(filepath.Join(dir, "shm")), os.RemoveAll(dir))
}

// RemovePodSandbox implements internalapi.PodSandboxManager.
func (r *Runtime) RemovePodSandbox(ctx context.Context, id string) error {
	s, err := r.findSandbox(id)
	if err != nil {
		return nil
	}
	if err := r.stopSandbox(ctx, s); err != nil {
		return rpcError(err)
	}
	for _, c := range r.containersOf(s.id) {
		if err := r.removeContainer(ctx, c); err != nil {
			return rpcError(err)
		}
	}
	s.op.Lock()
	defer s.op.Unlock()
	if err := sweep.RemoveAll(s.dir); err != nil {
		return rpcError(fmt.Errorf("remove sandbox %s: %w", s.id, err))
	}
	r.mu.Lock()
	_, there := r.sandboxes[s.id]
	delete(r.sandboxes, s.id)
	r.mu.Unlock()
	if there {
		r.emitSandbox(s, runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT)
	}
	return nil
}

// PodSandboxStatus implements internalapi.PodSandboxManager.
func (r *Runtime) PodSandboxStatus(_ context.Context, id string, verbose bool) (*runtimeapi.PodSandboxStatusResponse, error) {
	s, err := r.findSandbox(id)
	if err != nil {
		return nil, err
	}
	resp := &runtimeapi.PodSandboxStatusResponse{
		Status: s.status(), Timestamp: time.Now().UnixNano(),
	}
	for _, c := range r.containersOf(s.id) {
		resp.ContainersStatuses = append(resp.ContainersStatuses, c.criStatus())
	}
	if verbose {
		resp.Info = map[string]string{"netns": s.nsPath("net"), "cgroup": s.rec.CgroupParent}
	}
	return resp, nil
}

func (s *sandbox) state() runtimeapi.PodSandboxState {
	if s.record().Ready {
		return runtimeapi.PodSandboxState_SANDBOX_READY
	}
	return runtimeapi.PodSandboxState_SANDBOX_NOTREADY
}

func (s *sandbox) status() *runtimeapi.PodSandboxStatus {
	rec := s.record()
	st := &runtimeapi.PodSandboxStatus{
		Id: s.id, Metadata: s.config.GetMetadata(), State: s.state(), CreatedAt: rec.CreatedAt,
		Network: &runtimeapi.PodSandboxNetworkStatus{},
		Linux:   &runtimeapi.LinuxPodSandboxStatus{Namespaces: &runtimeapi.Namespace{Options: s.options()}},
		Labels:  s.config.GetLabels(), Annotations: s.config.GetAnnotations(), RuntimeHandler: rec.RuntimeHandler,
	}
	for i, ip := range rec.IPs {
		if _, err := netip.ParseAddr(ip); err != nil {
			continue
		}
		if i == 0 {
			st.Network.Ip = ip
			continue
		}
		st.Network.AdditionalIps = append(st.Network.AdditionalIps, &runtimeapi.PodIP{Ip: ip})
	}
	return st
}

// ListPodSandbox implements internalapi.PodSandboxManager.
func (r *Runtime) ListPodSandbox(_ context.Context, filter *runtimeapi.PodSandboxFilter) ([]*runtimeapi.PodSandbox, error) {
	r.mu.RLock()
	all := make([]*sandbox, 0, len(r.sandboxes))
	for _, s := range r.sandboxes {
		all = append(all, s)
	}
	r.mu.RUnlock()
	sort.Slice(all, func(i, j int) bool { return all[i].rec.CreatedAt < all[j].rec.CreatedAt })
	var out []*runtimeapi.PodSandbox
	for _, s := range all {
		if !s.matches(filter) {
			continue
		}
		out = append(out, &runtimeapi.PodSandbox{
			Id: s.id, Metadata: s.config.GetMetadata(), State: s.state(), CreatedAt: s.rec.CreatedAt,
			Labels: s.config.GetLabels(), Annotations: s.config.GetAnnotations(),
		})
	}
	return out, nil
}

func (s *sandbox) matches(f *runtimeapi.PodSandboxFilter) bool {
	if f == nil {
		return true
	}
	if f.Id != "" && !strings.HasPrefix(s.id, f.Id) {
		return false
	}
	if f.State != nil && f.State.State != s.state() {
		return false
	}
	return selects(f.LabelSelector, s.config.GetLabels())
}

func selects(selector, labels map[string]string) bool {
	for k, v := range selector {
		if labels[k] != v {
			return false
		}
	}
	return true
}

// UpdatePodSandboxResources implements internalapi.PodSandboxManager. The pod's
// cgroup is the caller's business; the configuration is kept up to date.
func (r *Runtime) UpdatePodSandboxResources(_ context.Context, req *runtimeapi.UpdatePodSandboxResourcesRequest) (*runtimeapi.UpdatePodSandboxResourcesResponse, error) {
	if _, err := r.findSandbox(req.GetPodSandboxId()); err != nil {
		return nil, err
	}
	return &runtimeapi.UpdatePodSandboxResourcesResponse{}, nil
}

// NetnsPath returns the bind mount of a sandbox's network namespace, "" when
// it uses the node's.
func (r *Runtime) NetnsPath(sandboxID string) (string, error) {
	s, err := r.findSandbox(sandboxID)
	if err != nil {
		return "", err
	}
	if s.rec.HostNetwork {
		return "", nil
	}
	return s.nsPath("net"), nil
}
