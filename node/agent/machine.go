package agent

import (
	"bufio"
	"bytes"
	"os"
	"path/filepath"
	goruntime "runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// machine is what the node tells about the computer it runs on.
type machine struct {
	machineID, systemUUID, bootID string
	kernel, osImage               string
	cpus                          int
	memoryBytes, swapBytes        uint64
	hugePages                     map[string]uint64 // bytes by page size, such as "2Mi"
}

func readMachine() machine {
	m := machine{
		machineID: firstLine("/etc/machine-id", "/var/lib/dbus/machine-id"), systemUUID: firstLine("/sys/class/dmi/id/product_uuid"),
		bootID: firstLine("/proc/sys/kernel/random/boot_id"), kernel: firstLine("/proc/sys/kernel/osrelease"),
		osImage: osImage(), cpus: goruntime.NumCPU(), hugePages: hugePages("/sys/kernel/mm/hugepages"),
	}
	if m.systemUUID == "" {
		m.systemUUID = m.machineID
	}
	info := meminfo()
	m.memoryBytes, m.swapBytes = info["MemTotal"], info["SwapTotal"]
	return m
}

func firstLine(paths ...string) string {
	for _, p := range paths {
		if b, err := os.ReadFile(p); err == nil {
			if s := strings.TrimSpace(string(b)); s != "" {
				return s
			}
		}
	}
	return ""
}

// meminfo returns /proc/meminfo in bytes.
func meminfo() map[string]uint64 {
	out := map[string]uint64{}
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return out
	}
	for sc := bufio.NewScanner(bytes.NewReader(b)); sc.Scan(); {
		f := strings.Fields(sc.Text())
		if len(f) < 2 {
			continue
		}
		if n, err := strconv.ParseUint(f[1], 10, 64); err == nil {
			out[strings.TrimSuffix(f[0], ":")] = n << 10
		}
	}
	return out
}

func osImage() string {
	b, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return "Linux"
	}
	for _, line := range strings.Split(string(b), "\n") {
		if v, ok := strings.CutPrefix(line, "PRETTY_NAME="); ok {
			return strings.Trim(v, `"`)
		}
	}
	return "Linux"
}

// hugePages reads how much memory is set aside for huge pages of each size.
func hugePages(dir string) map[string]uint64 {
	out := map[string]uint64{}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return out
	}
	for _, e := range entries {
		kb, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimPrefix(e.Name(), "hugepages-"), "kB"), 10, 64)
		if err != nil {
			continue
		}
		n, _ := strconv.ParseUint(firstLine(filepath.Join(dir, e.Name(), "nr_hugepages")), 10, 64)
		size := strconv.FormatUint(kb, 10) + "Ki"
		switch {
		case kb%(1<<20) == 0:
			size = strconv.FormatUint(kb>>20, 10) + "Gi"
		case kb%(1<<10) == 0:
			size = strconv.FormatUint(kb>>10, 10) + "Mi"
		}
		out[size] = n * kb << 10
	}
	return out
}

// disk is the fill level of a file system.
type disk struct{ total, available, inodes, inodesFree uint64 }

func statDisk(path string) (disk, error) {
	var s unix.Statfs_t
	if err := unix.Statfs(path, &s); err != nil {
		return disk{}, err
	}
	size := uint64(s.Frsize)
	return disk{total: s.Blocks * size, available: s.Bavail * size, inodes: s.Files, inodesFree: s.Ffree}, nil
}
