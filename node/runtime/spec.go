package runtime

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"strings"

	"github.com/containerd/containerd/v2/pkg/oci"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"knarr/node/image"
)

const defaultPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// spec translates a container's configuration into what the shim runs.
func (r *Runtime) spec(s *sandbox, c *container, img image.Image) (*specs.Spec, error) {
	sc := c.config.GetLinux().GetSecurityContext()
	if sc.GetPrivileged() && !s.config.GetLinux().GetSecurityContext().GetPrivileged() {
		return nil, invalid("a privileged container needs a privileged sandbox")
	}
	process, err := buildProcess(c.config, &img.Config.Config, c.rec.User, s.rec.Hostname)
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	resources := c.resources
	c.mu.Unlock()
	if resources != nil {
		adj := int(resources.OomScoreAdj)
		process.OOMScoreAdj = &adj
	}
	spec := &specs.Spec{
		Version: specs.Version,
		Root:    &specs.Root{Path: c.rootfs(), Readonly: sc.GetReadonlyRootfs()},
		Process: process,
		Annotations: map[string]string{
			"io.kubernetes.cri.sandbox-id": s.id, "io.kubernetes.cri.container-name": c.config.GetMetadata().GetName(),
		},
		Linux: &specs.Linux{
			CgroupsPath: c.rec.Cgroup,
			Namespaces:  s.namespaces(),
			Resources:   r.feats.resources(resources),
		},
	}
	spec.Linux.Resources.Devices = denyAllDevices()
	if err := r.joinPID(spec, s, c); err != nil {
		return nil, err
	}
	if r.feats.cgroup2 && !sc.GetPrivileged() {
		spec.Linux.Namespaces = append(spec.Linux.Namespaces, specs.LinuxNamespace{Type: specs.CgroupNamespace})
	}
	if err := r.addMounts(spec, s, c); err != nil {
		return nil, err
	}
	if err := addDevices(spec, c.config, sc.GetPrivileged()); err != nil {
		return nil, err
	}
	if !sc.GetPrivileged() {
		spec.Linux.MaskedPaths, spec.Linux.ReadonlyPaths = sc.GetMaskedPaths(), sc.GetReadonlyPaths()
	}
	if err := setSeccomp(spec, sc); err != nil {
		return nil, err
	}
	return spec, setAppArmor(spec, sc, r.feats.apparmor)
}

// buildProcess says what runs, as whom and with what environment.
func buildProcess(config *runtimeapi.ContainerConfig, img *ocispec.ImageConfig, user execUser, hostname string) (*specs.Process, error) {
	args := processArgs(config, img)
	if len(args) == 0 {
		return nil, invalid("no command specified: neither the container nor its image has one")
	}
	sc := config.GetLinux().GetSecurityContext()
	caps, err := capabilitySets(sc)
	if err != nil {
		return nil, err
	}
	cwd := config.GetWorkingDir()
	if cwd == "" {
		cwd = img.WorkingDir
	}
	if cwd == "" {
		cwd = "/"
	}
	env := []string{defaultPath}
	if config.GetTty() {
		env = append(env, "TERM=xterm")
	}
	env = setEnv(env, "HOSTNAME="+hostname)
	for _, e := range img.Env {
		env = setEnv(env, e)
	}
	for _, e := range config.GetEnvs() {
		env = setEnv(env, e.GetKey()+"="+string(e.GetValue()))
	}
	return &specs.Process{
		Args: args, Cwd: cwd, Env: env, Terminal: config.GetTty(),
		User:            specs.User{UID: user.UID, GID: user.GID, AdditionalGids: user.Groups},
		Capabilities:    caps,
		NoNewPrivileges: sc.GetNoNewPrivs(),
	}, nil
}

func processArgs(config *runtimeapi.ContainerConfig, img *ocispec.ImageConfig) []string {
	command, args := config.GetCommand(), config.GetArgs()
	if len(command) == 0 {
		if len(args) == 0 {
			args = img.Cmd
		}
		command = img.Entrypoint
	}
	return slices.Concat(command, args)
}

// setEnv replaces the variable of the same name or adds it.
func setEnv(env []string, entry string) []string {
	name, _, ok := strings.Cut(entry, "=")
	if !ok {
		return env
	}
	for i, e := range env {
		if strings.HasPrefix(e, name+"=") {
			env[i] = entry
			return env
		}
	}
	return append(env, entry)
}

// joinPID chooses the PID namespace.
func (r *Runtime) joinPID(spec *specs.Spec, s *sandbox, c *container) error {
	opts := c.config.GetLinux().GetSecurityContext().GetNamespaceOptions()
	ns := specs.LinuxNamespace{Type: specs.PIDNamespace}
	switch opts.GetPid() {
	case runtimeapi.NamespaceMode_NODE:
		return nil
	case runtimeapi.NamespaceMode_POD:
		pid := s.record().PausePID
		if pid == 0 {
			return precondition("sandbox %s has no shared PID namespace", s.id)
		}
		ns.Path = fmt.Sprintf("/proc/%d/ns/pid", pid)
	case runtimeapi.NamespaceMode_TARGET:
		target, err := r.findContainer(opts.GetTargetId())
		if err != nil {
			return invalid("target container of the PID namespace: %v", err)
		}
		p, st := target.snapshot()
		if target.rec.SandboxID != s.id || p != phaseRunning {
			return precondition("target container %s does not run in sandbox %s", target.id, s.id)
		}
		ns.Path = fmt.Sprintf("/proc/%d/ns/pid", st.PID)
	}
	spec.Linux.Namespaces = append(spec.Linux.Namespaces, ns)
	return nil
}

func ociMappings(in []*runtimeapi.IDMapping) []specs.LinuxIDMapping {
	var out []specs.LinuxIDMapping
	for _, m := range in {
		out = append(out, specs.LinuxIDMapping{HostID: m.HostId, ContainerID: m.ContainerId, Size: m.Length})
	}
	return out
}

func denyAllDevices() []specs.LinuxDeviceCgroup {
	return []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}}
}

// addDevices enters the devices that were asked for; a privileged container
// gets all of the node's.
func addDevices(spec *specs.Spec, config *runtimeapi.ContainerConfig, privileged bool) error {
	if privileged {
		all, err := oci.HostDevices()
		if err != nil {
			return fmt.Errorf("devices of the node: %w", err)
		}
		spec.Linux.Devices = all
		spec.Linux.Resources.Devices = []specs.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
		return nil
	}
	for _, d := range config.GetDevices() {
		path, err := filepath.EvalSymlinks(d.GetHostPath())
		if err != nil {
			return fmt.Errorf("device: %w", err)
		}
		found, err := oci.DeviceFromPath(path)
		if err != nil {
			return fmt.Errorf("device %s: %w", path, err)
		}
		found.Path = d.GetContainerPath()
		spec.Linux.Devices = append(spec.Linux.Devices, *found)
		spec.Linux.Resources.Devices = append(spec.Linux.Resources.Devices, specs.LinuxDeviceCgroup{
			Allow: true, Type: found.Type, Major: &found.Major, Minor: &found.Minor, Access: d.GetPermissions(),
		})
	}
	return nil
}

func procMount() specs.Mount {
	return specs.Mount{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}}
}

func devMount() specs.Mount {
	return specs.Mount{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}}
}

// systemMounts is what every container has; shared are options of the node's
// cgroup mount, which a privileged container shares.
func systemMounts(privileged bool, shared []string) []specs.Mount {
	mode := "ro"
	if privileged {
		mode = "rw"
	}
	cgroup := []string{"nosuid", "noexec", "nodev", "relatime", mode}
	if privileged {
		cgroup = append(cgroup, shared...)
	}
	return []specs.Mount{
		procMount(), devMount(),
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
		{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", mode}},
		{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: cgroup},
	}
}

// sandboxMounts are the files of the sandbox that a container sees.
func (s *sandbox) sandboxMounts(readonly bool) []*runtimeapi.Mount {
	shm := "/dev/shm"
	if s.options().GetIpc() != runtimeapi.NamespaceMode_NODE {
		shm = s.file("shm")
	}
	return []*runtimeapi.Mount{
		{ContainerPath: "/etc/hostname", HostPath: s.file("hostname"), Readonly: readonly},
		{ContainerPath: "/etc/hosts", HostPath: s.file("hosts"), Readonly: readonly},
		{ContainerPath: "/etc/resolv.conf", HostPath: s.file("resolv.conf"), Readonly: readonly},
		{ContainerPath: "/dev/shm", HostPath: shm},
	}
}

// addMounts orders the mounts by depth, the container's over the sandbox's over
// the system's.
func (r *Runtime) addMounts(spec *specs.Spec, s *sandbox, c *container) error {
	sc := c.config.GetLinux().GetSecurityContext()
	mounts := slices.Clone(c.config.GetMounts())
	taken := map[string]bool{}
	volumes := map[*runtimeapi.Mount]string{}
	for n, m := range mounts {
		taken[filepath.Clean(m.GetContainerPath())] = true
		if m.GetImage().GetImage() != "" {
			volumes[m] = c.volume(n)
		}
	}
	for _, m := range s.sandboxMounts(sc.GetReadonlyRootfs()) {
		if !taken[m.ContainerPath] {
			mounts = append(mounts, m)
		}
	}
	sort.SliceStable(mounts, func(i, j int) bool { return depth(mounts[i]) < depth(mounts[j]) })
	for _, m := range systemMounts(sc.GetPrivileged(), r.feats.cgroupOptions) {
		if taken[m.Destination] || taken["/dev"] && strings.HasPrefix(m.Destination, "/dev/") {
			continue
		}
		spec.Mounts = append(spec.Mounts, m)
	}
	for _, m := range mounts {
		bind, err := bindMount(spec, m, volumes[m])
		if err != nil {
			return fmt.Errorf("mount at %s: %w", m.GetContainerPath(), err)
		}
		spec.Mounts = append(spec.Mounts, bind)
	}
	return nil
}

func depth(m *runtimeapi.Mount) int {
	return strings.Count(filepath.Clean(m.GetContainerPath()), "/")
}

// bindMount translates one mount; volume is the directory of an image volume.
func bindMount(spec *specs.Spec, m *runtimeapi.Mount, volume string) (specs.Mount, error) {
	source := m.GetHostPath()
	readonly, recursive := m.GetReadonly(), m.GetRecursiveReadOnly()
	if volume != "" {
		sub := m.GetImageSubPath()
		if sub != "" && !filepath.IsLocal(sub) {
			return specs.Mount{}, invalid("path %q leads out of the image", sub)
		}
		source, readonly = filepath.Join(volume, sub), true
	}
	resolved, err := filepath.EvalSymlinks(source)
	if os.IsNotExist(err) && volume == "" {
		if err := os.MkdirAll(source, 0o755); err != nil {
			return specs.Mount{}, err
		}
		resolved, err = filepath.EvalSymlinks(source)
	}
	if err != nil {
		return specs.Mount{}, err
	}
	if volume != "" && resolved != volume && !strings.HasPrefix(resolved, volume+"/") {
		return specs.Mount{}, invalid("path %q leads out of the image", m.GetImageSubPath())
	}
	options := []string{"rbind"}
	switch m.GetPropagation() {
	case runtimeapi.MountPropagation_PROPAGATION_BIDIRECTIONAL:
		if !propagates(resolved) {
			return specs.Mount{}, precondition("%s is not on a shared mount, which bidirectional propagation needs", source)
		}
		options = append(options, "rshared")
		spec.Linux.RootfsPropagation = "rshared"
	case runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER:
		options = append(options, "rslave")
		if spec.Linux.RootfsPropagation == "" {
			spec.Linux.RootfsPropagation = "rslave"
		}
	default:
		options = append(options, "rprivate")
	}
	switch {
	case recursive && !readonly:
		return specs.Mount{}, invalid("a recursive read-only mount must be read-only")
	case recursive && m.GetPropagation() != runtimeapi.MountPropagation_PROPAGATION_PRIVATE:
		return specs.Mount{}, invalid("a recursive read-only mount needs private propagation")
	case recursive:
		options = append(options, "rro")
	case readonly:
		options = append(options, "ro")
	default:
		options = append(options, "rw")
	}
	return specs.Mount{
		Source: resolved, Destination: m.GetContainerPath(), Type: "bind", Options: options,
		UIDMappings: ociMappings(m.GetUidMappings()), GIDMappings: ociMappings(m.GetGidMappings()),
	}, nil
}
