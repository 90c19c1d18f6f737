package main

import (
	"context"
	"encoding/xml"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	imageutils "k8s.io/kubernetes/test/utils/image"

	"knarr/internal/rig"
	"knarr/internal/rig/machine"
)

const (
	// bin is the directory of the programs under test where the environment has no other.
	bin = "../../bin"
	// quickTimeout bounds the tests of the quick run.
	quickTimeout = 5 * time.Minute
	// quickParallel tests run at once: most of them wait for pods.
	quickParallel = 4
)

// quickFocus are conformance tests that take seconds and start agnhost, busybox, pause and nginx alone, without any of the tools that are
// Debian's; and a pull with policy Always. At least one is of each group that has such.
var quickFocus = []string{
	`\[sig-api-machinery\] AggregatedDiscovery should support raw aggregated discovery endpoint Accept headers`,
	`\[sig-api-machinery\] FieldValidation should detect unknown and duplicate fields of a typed object`,
	`\[sig-api-machinery\] Watchers should be able to restart watching from the last resource version`,
	`\[sig-api-machinery\] CustomResourceDefinition resources .* getting/updating/patching custom resource definition status sub-resource works`,
	`\[sig-apps\] ReplicaSet should serve a basic image on each replica with a public image`,
	`\[sig-apps\] Job should delete a job`,
	`\[sig-architecture\] Conformance Tests should have at least two untainted nodes`,
	`\[sig-auth\] ServiceAccounts should create a serviceAccountToken and ensure a successful TokenReview`,
	`\[sig-auth\] SubjectReview should support SubjectReview API operations`,
	`\[sig-cli\] Kubectl client Kubectl run pod should create a pod from an image when restart is Never`,
	`\[sig-cli\] Kubectl client Kubectl describe should check if kubectl describe prints relevant information for rc and pods`,
	`\[sig-instrumentation\] Events API should ensure that an event can be fetched, patched, deleted, and listed`,
	`\[sig-network\] EndpointSlice should create and delete EndpointSlices for a Service with a selector that matches no pods`,
	`\[sig-network\] Proxy version v1 A set of valid responses are returned for both pod and service Proxy`,
	`\[sig-node\] Container Runtime blackbox test when running a container with a new image \[Serial\] should be able to pull image`,
	`\[sig-node\] Downward API should provide pod name, namespace and IP address as env vars`,
	`\[sig-node\] Variable Expansion should allow substituting values in a container's command`,
	`\[sig-storage\] ConfigMap should be consumable from pods in volume \[`,
	`\[sig-storage\] EmptyDir volumes should support \(root,0644,tmpfs\)`,
}

// quickImages are all that those tests start.
var quickImages = []imageutils.ImageID{imageutils.Agnhost, imageutils.BusyBox, imageutils.Nginx, imageutils.Pause}

// quick is the kit for the quick run; name and dataDir are set inside of the machine.
func quick() (config, error) {
	c := config{bare: true, nodes: 2, parallel: quickParallel, timeout: quickTimeout, focus: strings.Join(quickFocus, "|"), top: "../..",
		knarr: filepath.Join(rig.Bin(bin), "knarr"), kubectl: filepath.Join(rig.Bin(bin), "kubectl")}
	if err := c.complete(); err != nil {
		return c, err
	}
	c.out = filepath.Join(c.top, "out", "quick")
	for _, p := range pictures {
		if slices.Contains(quickImages, p.ids[0]) {
			p.pulled = p.pulled || p.root == "agnhost" // so that at least one is
			c.pictures = append(c.pictures, p)
		}
	}
	return c, nil
}

// TestMain runs the tests in a machine of their own. What they need is built before: there is no network in it.
func TestMain(m *testing.M) {
	flag.Parse()
	if flag.Lookup("test.list").Value.String() != "" {
		os.Exit(m.Run())
	}
	if !machine.Started() {
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		c, err := quick()
		if err == nil {
			err = c.build(ctx)
		}
		stop()
		if err != nil {
			fmt.Fprintln(os.Stderr, "conformance:", err)
			os.Exit(1)
		}
	}
	os.Exit(machine.Main(m.Run, rig.Bin(bin), "knarr", "knarr-shim", "kubectl"))
}

// TestQuick runs a part of upstream's suite that takes a minute.
func TestQuick(t *testing.T) {
	c, err := quick()
	require.NoError(t, err)
	cluster := machine.Cluster("", "")
	c.name, c.dataDir = cluster.Name, cluster.Root
	require.NoError(t, c.test(t.Context()))
	report, err := os.ReadFile(c.report())
	require.NoError(t, err)
	var r results
	require.NoError(t, xml.Unmarshal(report, &r))
	for _, f := range quickFocus {
		name := regexp.MustCompile(f)
		require.True(t, slices.ContainsFunc(r.Cases, func(t testcase) bool { return name.MatchString(t.Name) && t.Status == "passed" }), "no test of that name ran: %s", f)
	}
	pulls, err := os.ReadFile(filepath.Join(c.out, "registry.log"))
	require.NoError(t, err)
	require.Regexp(t, `HEAD \S+/agnhost/manifests/\S+ns=registry.k8s.io`, string(pulls), "nobody resolved a tag at the mirror")
	require.Regexp(t, `GET \S+/agnhost/blobs/`, string(pulls), "nobody pulled from the mirror")
}
