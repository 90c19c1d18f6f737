package rig

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
)

// BuildEtcd builds etcd's server, a program of a module of its own, into the file out. source is the directory test/etcdserver.
func BuildEtcd(ctx context.Context, source, out string) error {
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", out, ".")
	build.Dir = source
	if said, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build etcd: %w\n%s", err, said)
	}
	return nil
}

// Etcd is a member of one, which ends with this process at the latest.
type Etcd struct {
	// URL is where it is asked.
	URL string
	// Cmd is its process.
	Cmd *exec.Cmd
	in  io.Closer
}

// StartEtcd runs program (BuildEtcd's) on the directory data and returns when it serves: at listen, a loopback address with a port, where 0 stands for any
// that is free.
func StartEtcd(program, data, listen string) (*Etcd, error) {
	e := &Etcd{Cmd: exec.Command(program, "-data-dir", data, "-listen", listen)}
	in, err := e.Cmd.StdinPipe() // it ends with its standard input
	if err != nil {
		return nil, err
	}
	e.in = in
	out, err := e.Cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := e.Cmd.Start(); err != nil {
		return nil, fmt.Errorf("start etcd: %w", err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		return nil, errors.Join(fmt.Errorf("etcd said nothing of its address: %w", err), e.Stop())
	}
	e.URL = strings.TrimSpace(line)
	return e, nil
}

// Stop ends the member and waits for it. Its data stays.
func (e *Etcd) Stop() error {
	return errors.Join(e.in.Close(), e.Cmd.Wait())
}
