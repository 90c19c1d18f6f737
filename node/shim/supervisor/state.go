//go:build cgo

package supervisor

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"knarr/node/shim"
)

const (
	startFile  = "start.json"
	statusFile = "status.json"
)

// record is start.json: what a later shim and an exec need to know.
type record struct {
	Log        shim.LogConfig `json:"log"`
	Stdin      bool           `json:"stdin,omitempty"`
	StdinOnce  bool           `json:"stdinOnce,omitempty"`
	Terminal   bool           `json:"terminal,omitempty"`
	PrivatePID bool           `json:"privatePID,omitempty"`
	// Process is the template of exec'd processes, already clamped.
	Process *specs.Process `json:"process"`
}

// writeJSON replaces dir/name atomically with respect to a crash of the
// process. After a power loss a missing or torn file reads as "lost", which is
// right then: no container survives that.
func writeJSON(dir, name string, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	tmp := filepath.Join(dir, "."+name)
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, filepath.Join(dir, name))
}

func readJSON(dir, name string, v any) error {
	data, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return err
	}
	return json.Unmarshal(data, v)
}

// bootID identifies this run of the kernel.
func bootID() string {
	data, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(data))
}

// processStart returns field 22 of /proc/<pid>/stat, the time in clock ticks
// at which the process started; with the pid it names a process for good.
func processStart(pid int) (uint64, error) {
	data, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, err
	}
	s := string(data)
	end := strings.LastIndexByte(s, ')')
	if end < 0 {
		return 0, errors.New("malformed stat")
	}
	fields := strings.Fields(s[end+1:])
	const startField = 22 - 3 // the first field after the name is number 3
	if len(fields) <= startField {
		return 0, errors.New("malformed stat")
	}
	return strconv.ParseUint(fields[startField], 10, 64)
}

// validID accepts what is safe as a file name and as a cgroup name.
func validID(id string) error {
	if id == "" || len(id) > 128 || id == "." || id == ".." {
		return fmt.Errorf("bad container id %q", id)
	}
	for _, r := range id {
		ok := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_' || r == '.'
		if !ok {
			return fmt.Errorf("bad container id %q", id)
		}
	}
	return nil
}
