package runtime

import (
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"

	"github.com/moby/sys/user"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// execUser is who the process of a container is.
type execUser struct {
	UID    uint32   `json:"uid"`
	GID    uint32   `json:"gid"`
	Groups []uint32 `json:"groups,omitempty"`
}

func (u execUser) cri() *runtimeapi.ContainerUser {
	linux := &runtimeapi.LinuxContainerUser{Uid: int64(u.UID), Gid: int64(u.GID)}
	for _, g := range u.Groups {
		linux.SupplementalGroups = append(linux.SupplementalGroups, int64(g))
	}
	return &runtimeapi.ContainerUser{Linux: linux}
}

// resolveUser finds the user by the security context, else by the image, with
// the passwd and group files of the root file system.
func resolveUser(rootfs string, sc *runtimeapi.LinuxContainerSecurityContext, imageUser string) (execUser, error) {
	want, err := userString(sc, imageUser)
	if err != nil {
		return execUser{}, err
	}
	root, err := os.OpenRoot(rootfs)
	if err != nil {
		return execUser{}, err
	}
	defer func() { _ = root.Close() }()
	passwd, closePasswd := openIn(root, "etc/passwd")
	defer closePasswd()
	group, closeGroup := openIn(root, "etc/group")
	defer closeGroup()
	found, err := user.GetExecUser(want, &user.ExecUser{}, passwd, group)
	if err != nil {
		return execUser{}, fmt.Errorf("user %q: %w", want, err)
	}
	u := execUser{UID: uint32(found.Uid), GID: uint32(found.Gid)}
	if sc.GetSupplementalGroupsPolicy() != runtimeapi.SupplementalGroupsPolicy_Strict {
		for _, g := range found.Sgids {
			u.Groups = append(u.Groups, uint32(g))
		}
	}
	u.Groups = append(u.Groups, u.GID)
	for _, g := range sc.GetSupplementalGroups() {
		u.Groups = append(u.Groups, uint32(g))
	}
	slices.Sort(u.Groups)
	u.Groups = slices.Compact(u.Groups)
	return u, nil
}

// openIn opens a file of the root file system for reading; nil where there is
// none. A link that leads out of it counts as none.
func openIn(root *os.Root, name string) (io.Reader, func()) {
	f, err := root.Open(name)
	if err != nil {
		return nil, func() {}
	}
	return f, func() { _ = f.Close() }
}

// userString is "user[:group]" in the form of an image's USER.
func userString(sc *runtimeapi.LinuxContainerSecurityContext, imageUser string) (string, error) {
	name := sc.GetRunAsUsername()
	if sc.GetRunAsUser() != nil {
		name = strconv.FormatInt(sc.GetRunAsUser().GetValue(), 10)
	}
	if name == "" {
		if sc.GetRunAsGroup() != nil {
			return "", invalid("a group (%d) without a user is not possible", sc.GetRunAsGroup().GetValue())
		}
		return imageUser, nil
	}
	if sc.GetRunAsGroup() != nil {
		name += ":" + strconv.FormatInt(sc.GetRunAsGroup().GetValue(), 10)
	}
	return name, nil
}
