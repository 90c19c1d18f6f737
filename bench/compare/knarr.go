package main

import (
	"context"
	"errors"
	"path/filepath"

	"knarr/internal/rig"
)

// ours is a node of knarr, started as anybody starts one.
type ours struct {
	plan
	cluster *rig.Cluster
	said    chan error
}

const clusterName = "compare"

func newKnarr(p plan) side {
	return &ours{plan: p, cluster: &rig.Cluster{Bin: p.Knarr, Name: clusterName, Root: filepath.Join(p.Dir, "data")}}
}

// knarrKubeconfig is where the admin's kubeconfig of a machine of knarr appears.
func (p plan) knarrKubeconfig() string {
	return filepath.Join(p.Dir, "data", clusterName, "admin.kubeconfig")
}

func (o *ours) start() error {
	o.said = make(chan error, 1)
	go func() {
		_, err := o.cluster.Up(context.Background(), 1)
		o.said <- err
	}()
	return nil
}

// join has nothing to do: start has ordered the whole.
func (o *ours) join() error { return nil }

func (o *ours) images(ctx context.Context) error {
	if err := o.wait(); err != nil {
		return err
	}
	return o.cluster.BuildBusybox(ctx, "busybox:1")
}

// wait gives what knarr up said.
func (o *ours) wait() error {
	if o.said == nil {
		return nil
	}
	err := <-o.said
	o.said = nil
	return err
}

func (o *ours) stop() error {
	return errors.Join(o.wait(), o.cluster.Down(context.Background(), true))
}
