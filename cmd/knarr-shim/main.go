//go:build cgo

// Command knarr-shim is the one small process per node that parents every
// container. It is started by the node agent, or by hand:
//
//	knarr-shim -dir DIR [-ready-fd N]
//
// It writes "ok" and a newline to the ready descriptor when it serves, or the
// reason why it does not. `knarr-shim init` is libcontainer's half of starting
// a container and `knarr-shim pause` the first process of a shared PID
// namespace; both are for internal use.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log"
	"os"
	"os/signal"
	"runtime/debug"

	_ "github.com/opencontainers/cgroups/devices" // device rules of cgroups
	"github.com/opencontainers/runc/libcontainer"
	_ "github.com/opencontainers/runc/libcontainer/nsenter" // must be first in a container's init
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"

	_ "knarr/node/shim/slack"
	"knarr/node/shim/supervisor"
)

// gcPercent keeps the heap small: the shim is idle nearly always.
const gcPercent = 50

func main() {
	if len(os.Args) > 1 && os.Args[1] == "init" {
		debug.SetGCPercent(-1) // it lives for milliseconds
		libcontainer.Init()    // does not return
	}
	dir := flag.String("dir", "", "state directory")
	readyFD := flag.Int("ready-fd", 0, "descriptor that is told when the shim serves")
	flag.Parse()
	if *dir == "" || flag.NArg() > 0 {
		fmt.Fprintln(os.Stderr, "usage: knarr-shim -dir DIR [-ready-fd N]")
		os.Exit(2)
	}
	logger := log.New(os.Stderr, "", log.LstdFlags|log.LUTC)
	var ready *os.File
	if *readyFD > 0 {
		ready = os.NewFile(uintptr(*readyFD), "ready")
	}
	if err := run(*dir, ready, logger); err != nil {
		if ready != nil {
			_, _ = fmt.Fprintln(ready, err)
		}
		logger.Print(err)
		if errors.Is(err, supervisor.ErrRunning) {
			os.Exit(3)
		}
		os.Exit(1)
	}
}

func run(dir string, ready *os.File, logger *log.Logger) error {
	if err := supervisor.Seal(); err != nil {
		return err
	}
	debug.SetGCPercent(gcPercent)
	// libcontainer gives this to a container's init and nothing else: it needs
	// one processor. Our own number of processors was set at start.
	if err := os.Setenv("GOMAXPROCS", "1"); err != nil {
		return err
	}
	logrus.SetLevel(logrus.WarnLevel)
	logrus.SetFormatter(supervisor.LogFormat{Formatter: logrus.StandardLogger().Formatter})
	if ready != nil {
		unix.CloseOnExec(int(ready.Fd()))
	}
	// The agent's terminal and its end are none of our business.
	signal.Ignore(unix.SIGHUP, unix.SIGPIPE)
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	return supervisor.Run(ctx, supervisor.Config{
		Dir: dir,
		Log: logger,
		Ready: func() error {
			if ready == nil {
				return nil
			}
			_, err := fmt.Fprintln(ready, "ok")
			return errors.Join(err, ready.Close())
		},
	})
}
