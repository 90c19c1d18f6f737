// Command knarr is a whole Kubernetes in one program; `knarr --help` lists what it does.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"knarr/cli"
	"knarr/system"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	status := cli.Execute(ctx, os.Args[1:], system.New())
	stop()
	os.Exit(status)
}
