package shim

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// spawnLimit bounds the time from the start of the shim to its readiness; with
// many containers to take over that is some 100 ms.
const spawnLimit = 30 * time.Second

// spawn starts the shim in a session of its own, so that it outlives us, and
// returns when it serves.
func spawn(ctx context.Context, opts Options) error {
	if err := os.MkdirAll(opts.Dir, 0o700); err != nil {
		return err
	}
	out, err := os.OpenFile(filepath.Join(opts.Dir, LogName), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = out.Close() }()
	ready, theirs, err := os.Pipe()
	if err != nil {
		return err
	}
	defer func() { _ = ready.Close() }()
	// Not CommandContext: the shim outlives the context.
	cmd := exec.Command(opts.Path, "-dir", opts.Dir, "-ready-fd", "3")
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.Stdout, cmd.Stderr = out, out
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	_ = theirs.Close()
	if err != nil {
		return fmt.Errorf("start %s: %w", opts.Path, err)
	}
	// The shim's end is seen by its socket; this only spares us a zombie.
	go func() { _ = cmd.Wait() }()

	_ = ready.SetReadDeadline(time.Now().Add(spawnLimit))
	stop := context.AfterFunc(ctx, func() { _ = ready.SetReadDeadline(time.Now()) })
	defer stop()
	line, err := bufio.NewReader(ready).ReadString('\n')
	line = strings.TrimSpace(line)
	switch {
	case line == "ok":
		return nil
	case strings.Contains(line, "already running"):
		return nil // someone else was faster
	case line != "":
		return fmt.Errorf("knarr-shim: %s", line)
	case ctx.Err() != nil:
		return context.Cause(ctx)
	default:
		return errors.Join(fmt.Errorf("knarr-shim did not come up, see %s", out.Name()), err)
	}
}
