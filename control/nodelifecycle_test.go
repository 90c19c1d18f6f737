package control

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"go/ast"
	"go/parser"
	"go/printer"
	"go/token"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// A node that is not ready gets the taint that drives its pods away, an event says so, and both end with its cause.
func TestNodesThatAreNotReadyAreTainted(t *testing.T) {
	c := newCluster(t)
	for _, name := range []string{"good", "bad", "other"} { // where no node is ready, nothing is tainted
		c.node(name)
	}
	tainted := func(want bool) func(context.Context) error {
		return func(ctx context.Context) error {
			n, err := c.admin.CoreV1().Nodes().Get(ctx, "bad", metav1.GetOptions{})
			if err != nil {
				return err
			}
			for _, taint := range n.Spec.Taints {
				if taint.Key == corev1.TaintNodeNotReady && taint.Effect == corev1.TaintEffectNoExecute {
					if want {
						return nil
					}
					return notYet("%v", n.Spec.Taints)
				}
			}
			if want {
				return notYet("%v", n.Spec.Taints)
			}
			return nil
		}
	}
	c.eventually("nodes that are ready have no taint", tainted(false))
	c.eventually("the controller knows them", func(ctx context.Context) error { return happened(ctx, c, "RegisteredNode") })
	c.sayReady("bad", corev1.ConditionFalse)
	c.eventually("the taint comes", tainted(true))
	c.sayReady("bad", corev1.ConditionTrue)
	c.eventually("the taint goes", tainted(false))
}

func happened(ctx context.Context, c *cluster, reason string) error {
	events, err := c.admin.CoreV1().Events("default").List(ctx, metav1.ListOptions{FieldSelector: "reason=" + reason})
	if err == nil && len(events.Items) < 3 {
		err = notYet("%d events", len(events.Items))
	}
	return err
}

// sayReady has a node say whether it is ready.
func (c *cluster) sayReady(name string, status corev1.ConditionStatus) {
	now := metav1.Now()
	patch, err := json.Marshal(map[string]any{"status": map[string]any{"conditions": []corev1.NodeCondition{
		{Type: corev1.NodeReady, Status: status, Reason: "Test", LastHeartbeatTime: now, LastTransitionTime: now}}}})
	require.NoError(c.t, err)
	_, err = c.admin.CoreV1().Nodes().Patch(c.t.Context(), name, types.StrategicMergePatchType, patch, metav1.PatchOptions{}, "status")
	require.NoError(c.t, err)
}

// What nodelifecycle.go takes from upstream's package by its name, and the Run that it replaces, are still what they were when it was
// written. Where this fails, read upstream's Run, bring ours to the same, and put what the failure says here.
func TestNodeLifecycleParts(t *testing.T) {
	want := map[string]string{
		"Run":                        "sha256 f21b78aebb930c1aad4f5595b0ed4300a7b57926ca49a557ba241cb5f7cbff93",
		"processTaintBaseEviction":   "sha256 febb3ed471503dc9adec605466a631b2ac97aab20650013825255108acb7b1fd",
		"doNodeProcessingPassWorker": "func(ctx context.Context)",
		"doPodProcessingWorker":      "func(ctx context.Context)",
		"doNoExecuteTaintingPass":    "func(ctx context.Context)",
		"monitorNodeHealth":          "func(ctx context.Context) error",
		"podUpdateWorkerSize":        "4",
		"nodeUpdateWorkerSize":       "8",
	}
	dir, err := exec.Command("go", "list", "-f", "{{.Dir}}", "k8s.io/kubernetes/pkg/controller/nodelifecycle").Output()
	require.NoError(t, err)
	file, err := parser.ParseFile(token.NewFileSet(), filepath.Join(strings.TrimSpace(string(dir)), "node_lifecycle_controller.go"), nil, 0)
	require.NoError(t, err)
	got := map[string]string{}
	text := func(n ast.Node) string {
		var b bytes.Buffer
		require.NoError(t, printer.Fprint(&b, token.NewFileSet(), n))
		return b.String()
	}
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.FuncDecl:
			if strings.HasPrefix(want[n.Name.Name], "sha256") {
				sum := sha256.Sum256([]byte(text(n.Body)))
				got[n.Name.Name] = "sha256 " + hex.EncodeToString(sum[:])
			} else if n.Recv != nil {
				got[n.Name.Name] = text(n.Type)
			}
		case *ast.ValueSpec:
			if len(n.Names) == 1 && len(n.Values) == 1 {
				got[n.Names[0].Name] = text(n.Values[0])
			}
		}
		return true
	})
	for name, w := range want {
		require.Equal(t, w, got[name], name)
	}
}
