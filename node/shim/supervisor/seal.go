//go:build cgo

package supervisor

import (
	"fmt"
	"os"
	"unsafe"

	"github.com/opencontainers/runc/libcontainer/exeseal"
	"golang.org/x/sys/unix"
)

// Seal makes the process run from a sealed copy of its binary in memory. A
// container can then never write to the binary that its init came from, and no
// start of a container has to copy it. On success it does not return the first
// time (it executes the copy) and returns nil in the copy.
func Seal() error {
	if exeseal.IsSelfExeCloned() {
		return setName("knarr-shim")
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	src, err := os.Open("/proc/self/exe")
	if err != nil {
		return err
	}
	info, err := src.Stat()
	if err != nil {
		return err
	}
	sealed, err := exeseal.CloneBinary(src, info.Size(), "knarr-shim", os.TempDir())
	if err != nil {
		return fmt.Errorf("seal own binary: %w", err)
	}
	if !exeseal.IsCloned(sealed) {
		return fmt.Errorf("seal own binary: the kernel has no sealed memory files")
	}
	env := append(os.Environ(), binaryEnv+"="+self)
	return os.NewSyscallError("exec", unix.Exec(fmt.Sprintf("/proc/self/fd/%d", sealed.Fd()), os.Args, env))
}

// setName sets what ps shows for the calling thread, which is the main one
// early in main; at most 15 bytes.
func setName(name string) error {
	b, err := unix.BytePtrFromString(name)
	if err != nil {
		return err
	}
	return os.NewSyscallError("prctl(PR_SET_NAME)", unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(b)), 0, 0, 0))
}
