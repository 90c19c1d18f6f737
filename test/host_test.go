package test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/nftables"
	"github.com/stretchr/testify/require"
	"github.com/vishvananda/netlink"

	"knarr/internal/rig"
	"knarr/network/netns"
)

// hostState is everything that a cluster could leave behind on the machine, as text.
type hostState map[string][]string

// lookAtHost reads the machine's state. Things of this network namespace are read in full; of what all namespaces share
// (processes, mounts, cgroups, files), that of the cluster.
func lookAtHost(c *rig.Cluster) (hostState, error) {
	s := hostState{}
	for name, look := range map[string]func(*rig.Cluster) ([]string, error){
		"processes": processes, "mounts": mounts, "links": links, "addresses": addresses, "routes": routes, "rules": rules,
		"nftables": tables, "cgroups": cgroups, "files": files, "forwarding": forwarding,
	} {
		found, err := look(c)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		slices.Sort(found)
		s[name] = found
	}
	return s, nil
}

// requireSame fails with what one has and the other has not.
func requireSame(t *testing.T, before, after hostState) {
	t.Helper()
	for name := range before {
		require.Equal(t, before[name], after[name], "%s differ before and after", name)
	}
}

// processes lists those whose arguments, environment or cgroups name the cluster.
func processes(c *rig.Cluster) ([]string, error) {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	self := fmt.Sprintf("/proc/%d", os.Getpid())
	var out []string
	for _, d := range dirs {
		args, _ := os.ReadFile(d + "/cmdline")
		groups, _ := os.ReadFile(d + "/cgroup")
		text := strings.ReplaceAll(string(args), "\x00", " ")
		mine := strings.Contains(text, "--name "+c.Name+" ") || strings.Contains(text, filepath.Join(c.Root, c.Name)) ||
			strings.Contains(string(groups), "/knarr-"+c.Name)
		stat, _ := os.ReadFile(d + "/stat")
		dead := strings.Contains(string(stat), ") Z ") // it waits for init alone
		if d != self && mine && !dead && !strings.Contains(text, ".test ") {
			out = append(out, filepath.Base(d)+" "+text)
		}
	}
	return out, nil
}

func mounts(c *rig.Cluster) ([]string, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	var out []string
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 && (strings.HasPrefix(f[4], filepath.Join(c.Root, c.Name)) || strings.Contains(f[4], "/knarr/") && strings.Contains(f[4], c.Name)) {
			out = append(out, f[4])
		}
	}
	return out, err
}

func links(*rig.Cluster) ([]string, error) {
	list, err := netns.Dump(netlink.LinkList)
	var out []string
	for _, l := range list {
		out = append(out, l.Attrs().Name)
	}
	return out, err
}

func addresses(*rig.Cluster) ([]string, error) {
	list, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	var out []string
	for _, a := range list {
		out = append(out, a.String())
	}
	return out, err
}

func routes(*rig.Cluster) ([]string, error) {
	list, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{}, netlink.RT_FILTER_TABLE)
	var out []string
	for _, r := range list {
		out = append(out, r.String())
	}
	return out, err
}

func rules(*rig.Cluster) ([]string, error) {
	list, err := netlink.RuleList(netlink.FAMILY_ALL)
	var out []string
	for _, r := range list {
		out = append(out, r.String())
	}
	return out, err
}

func tables(*rig.Cluster) ([]string, error) {
	conn, err := nftables.New()
	if err != nil {
		return nil, err
	}
	list, err := conn.ListTables()
	var out []string
	for _, t := range list {
		out = append(out, t.Name)
	}
	return out, err
}

func cgroups(c *rig.Cluster) ([]string, error) {
	var out []string
	for _, pattern := range []string{"/sys/fs/cgroup/knarr-", "/sys/fs/cgroup/*/knarr-"} {
		found, err := filepath.Glob(pattern + c.Name)
		if err != nil {
			return nil, err
		}
		out = append(out, found...)
	}
	return out, nil
}

func files(c *rig.Cluster) ([]string, error) {
	var out []string
	for _, pattern := range []string{filepath.Join(c.Root, c.Name), "/run/knarr/*/" + c.Name + "*", "/run/knarr/" + c.Name + "*", "/var/lib/knarr/" + c.Name,
		"/var/log/pods/*" + c.Name + "*", "/var/log/containers/*" + c.Name + "*"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			return nil, err
		}
		out = append(out, found...)
	}
	return out, nil
}

func forwarding(*rig.Cluster) ([]string, error) {
	b, err := os.ReadFile("/proc/sys/net/ipv4/ip_forward")
	return []string{strings.TrimSpace(string(b))}, err
}
