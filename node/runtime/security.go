package runtime

import (
	"encoding/json"
	"fmt"
	"os"
	goruntime "runtime"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/contrib/seccomp"
	"github.com/moby/sys/capability"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// defaultCapabilities is what a container has unless it asks otherwise: the set
// of Docker and containerd.
func defaultCapabilities() []string {
	return []string{
		"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID",
		"CAP_SETUID", "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL", "CAP_AUDIT_WRITE",
	}
}

func allCapabilities() []string {
	var all []string
	for _, c := range capability.ListKnown() {
		all = append(all, "CAP_"+strings.ToUpper(c.String()))
	}
	return all
}

// capabilitySets applies adds and drops; the shim cuts the result down to what
// it has itself.
func capabilitySets(sc *runtimeapi.LinuxContainerSecurityContext) (*specs.LinuxCapabilities, error) {
	set := defaultCapabilities()
	if sc.GetPrivileged() {
		set = allCapabilities()
	} else {
		known := allCapabilities()
		adds, drops := sc.GetCapabilities().GetAddCapabilities(), sc.GetCapabilities().GetDropCapabilities()
		if hasAll(adds) {
			set = slices.Clone(known)
		}
		if hasAll(drops) {
			set = nil
		}
		for _, name := range adds {
			if isAll(name) {
				continue
			}
			full := capabilityName(name)
			if !slices.Contains(known, full) {
				return nil, invalid("unknown capability to add: %q", full)
			}
			if !slices.Contains(set, full) {
				set = append(set, full)
			}
		}
		for _, name := range drops {
			full := capabilityName(name)
			set = slices.DeleteFunc(set, func(c string) bool { return c == full })
		}
	}
	return &specs.LinuxCapabilities{Bounding: set, Effective: set, Permitted: set}, nil
}

func isAll(name string) bool     { return strings.EqualFold(name, "ALL") }
func hasAll(names []string) bool { return slices.ContainsFunc(names, isAll) }
func capabilityName(n string) string {
	n = strings.ToUpper(n)
	if strings.HasPrefix(n, "CAP_") {
		return n
	}
	return "CAP_" + n
}

// setSeccomp chooses the system call filter. spec must have its capabilities:
// the default profile allows what they need.
func setSeccomp(spec *specs.Spec, sc *runtimeapi.LinuxContainerSecurityContext) error {
	if sc.GetPrivileged() {
		return nil
	}
	switch p := sc.GetSeccomp(); p.GetProfileType() {
	case runtimeapi.SecurityProfile_RuntimeDefault:
		if p != nil { // the zero value of a missing profile is RuntimeDefault too
			spec.Linux.Seccomp = seccomp.DefaultProfile(spec)
			trimArchitectures(spec.Linux.Seccomp)
		}
	case runtimeapi.SecurityProfile_Localhost:
		data, err := os.ReadFile(strings.TrimPrefix(p.GetLocalhostRef(), "localhost/"))
		if err != nil {
			return fmt.Errorf("seccomp profile: %w", err)
		}
		profile := &specs.LinuxSeccomp{}
		if err := json.Unmarshal(data, profile); err != nil {
			return fmt.Errorf("seccomp profile %s: %w", p.GetLocalhostRef(), err)
		}
		spec.Linux.Seccomp = profile
	case runtimeapi.SecurityProfile_Unconfined:
	}
	return nil
}

// trimArchitectures takes the x32 ABI out of the filter where the kernel has
// none: compiling the rules for it takes a third of the filter's time, and that
// is the most expensive part of the start of a container.
func trimArchitectures(profile *specs.LinuxSeccomp) {
	const x32GetPID = 0x40000000 | 39
	if goruntime.GOARCH != "amd64" {
		return
	}
	if _, _, errno := unix.RawSyscall(x32GetPID, 0, 0, 0); errno == unix.ENOSYS {
		profile.Architectures = slices.DeleteFunc(profile.Architectures, func(a specs.Arch) bool { return a == specs.ArchX32 })
	}
}

// setAppArmor names the profile. The default profile of other runtimes has to
// be loaded by a program of the host; where it is not loaded, containers run
// without one.
func setAppArmor(spec *specs.Spec, sc *runtimeapi.LinuxContainerSecurityContext, enabled bool) error {
	p := sc.GetApparmor()
	if p.GetProfileType() != runtimeapi.SecurityProfile_Localhost || sc.GetPrivileged() && p == nil {
		return nil
	}
	name := strings.TrimPrefix(p.GetLocalhostRef(), "localhost/")
	if !enabled {
		return invalid("AppArmor profile %q: this node has no AppArmor", name)
	}
	profiles, err := os.ReadFile("/sys/kernel/security/apparmor/profiles")
	if err != nil {
		return fmt.Errorf("AppArmor profile %q: %w", name, err)
	}
	for line := range strings.Lines(string(profiles)) {
		if strings.HasPrefix(line, name+" (") {
			spec.Process.ApparmorProfile = name
			return nil
		}
	}
	return invalid("AppArmor profile %q is not loaded on this node", name)
}
