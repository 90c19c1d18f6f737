package runtime

import (
	"fmt"
	"os"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// propagates tells whether path is on a shared mount.
func propagates(path string) bool {
	info, err := mount.Lookup(path)
	if err != nil {
		return false
	}
	for _, field := range strings.Fields(info.Optional) {
		if strings.HasPrefix(field, "shared:") {
			return true
		}
	}
	return false
}

// mapRootfs makes the mounts of a root file system appear owned by the users of
// a user namespace: the layers by an id-mapped mount, the writable directory by
// its owner.
func mapRootfs(mounts []mount.Mount, userns *runtimeapi.UserNamespace) ([]mount.Mount, error) {
	out := make([]mount.Mount, 0, len(mounts))
	for _, m := range mounts {
		if m.Type != "overlay" {
			return nil, precondition("a user namespace needs overlay root file systems, not %q", m.Type)
		}
		options := append([]string{}, m.Options...)
		options = append(options, "uidmap="+mappingOption(userns.GetUids()), "gidmap="+mappingOption(userns.GetGids()))
		for _, o := range m.Options {
			upper, ok := strings.CutPrefix(o, "upperdir=")
			if !ok {
				continue
			}
			if err := os.Chown(upper, int(userns.GetUids()[0].HostId), int(userns.GetGids()[0].HostId)); err != nil {
				return nil, err
			}
		}
		out = append(out, mount.Mount{Type: m.Type, Source: m.Source, Target: m.Target, Options: options})
	}
	return out, nil
}

func mappingOption(list []*runtimeapi.IDMapping) string {
	var parts []string
	for _, m := range list {
		parts = append(parts, fmt.Sprintf("%d:%d:%d", m.ContainerId, m.HostId, m.Length))
	}
	return strings.Join(parts, ",")
}
