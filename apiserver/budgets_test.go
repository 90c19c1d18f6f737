package apiserver_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	crdclient "k8s.io/apiextensions-apiserver/pkg/client/clientset/clientset"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"

	"knarr/apiserver"
	"knarr/internal/rig"
)

// budgetsFile holds, line by line, an operation, how many allocations it may cost, and for some how many thousands of instructions, tabs between
// them: of the whole pipeline behind the socket, the request's making and (as to allocations) the store's commit. Who makes an operation dearer
// has to say so there.
const budgetsFile = "testdata/budgets.tsv"

// budgetRuns is over how many runs an operation is measured, budgetTries how often: what else allocates meanwhile counts with it.
const (
	budgetRuns  = 200
	budgetTries = 3
)

// budgetListed is the number of objects in a list, budgetWatchers that of watches that see a change.
const budgetListed, budgetWatchers = 100, 100

// operations are what budgets are for; each is called with the number of its run.
func operations(t *testing.T, c *cluster) map[string]func(i int) {
	ns, err := c.CoreV1().Namespaces().Create(context.Background(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "budget-"}}, metav1.CreateOptions{})
	require.NoError(t, err)
	_, err = c.CoreV1().ServiceAccounts(ns.Name).Create(context.Background(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "bench"}}, metav1.CreateOptions{})
	require.NoError(t, err)
	root := "/api/v1/namespaces/" + ns.Name
	send(t, c, http.MethodPost, root+"/pods", runtime.ContentTypeProtobuf, encodeProto(t, benchPod("patched")))
	send(t, c, http.MethodPost, root+"/configmaps", runtime.ContentTypeProtobuf, encodeProto(t, configMap("patched", nil)))
	for i := range budgetListed {
		send(t, c, http.MethodPost, root+"/secrets", runtime.ContentTypeProtobuf, encodeProto(t, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprint("s", i)}}))
	}
	read := func(path string) func(int) {
		return func(int) { require.Equal(t, http.StatusOK, fetch(t, c, root+path, runtime.ContentTypeProtobuf).Code) }
	}
	watched := gatherAudience(t, serveOn(t, func(*apiserver.Config) {}, func(*apiserver.Server) {}, false), budgetWatchers)
	ships := "/apis/budget.example.com/v1/namespaces/" + ns.Name + "/ships"
	defineShips(t, c, ships, "budget.example.com")
	send(t, c, http.MethodPost, ships, runtime.ContentTypeJSON, shipBody("known"))
	return map[string]func(i int){
		"get Pod": read("/pods/patched"),
		fmt.Sprintf("list %d Secrets", budgetListed):                read("/secrets"),
		fmt.Sprintf("patch ConfigMap, %d watchers", budgetWatchers): func(int) { watched.change(t) },
		"create ConfigMap": func(i int) {
			send(t, c, http.MethodPost, root+"/configmaps", runtime.ContentTypeProtobuf, encodeProto(t, configMap(fmt.Sprintf("m%d", i), nil)))
		},
		"create Pod": func(i int) {
			send(t, c, http.MethodPost, root+"/pods", runtime.ContentTypeProtobuf, encodeProto(t, benchPod(fmt.Sprintf("p%d", i))))
		},
		"patch Pod status": func(i int) {
			body := fmt.Sprintf(`{"status":{"phase":"Running","message":"%d","conditions":[{"type":"Ready","status":"True","lastTransitionTime":"2026-01-01T00:00:00Z"}]}}`, i)
			send(t, c, http.MethodPatch, root+"/pods/patched/status", string(types.StrategicMergePatchType), []byte(body))
		},
		"create and delete ConfigMap": func(i int) {
			send(t, c, http.MethodPost, root+"/configmaps", runtime.ContentTypeProtobuf, encodeProto(t, configMap(fmt.Sprintf("d%d", i), nil)))
			send(t, c, http.MethodDelete, root+fmt.Sprintf("/configmaps/d%d", i), runtime.ContentTypeJSON, nil)
		},
		"create and delete Pod": func(i int) {
			send(t, c, http.MethodPost, root+"/pods", runtime.ContentTypeProtobuf, encodeProto(t, benchPod(fmt.Sprintf("d%d", i))))
			send(t, c, http.MethodDelete, root+fmt.Sprintf("/pods/d%d", i), runtime.ContentTypeJSON, []byte(`{"gracePeriodSeconds":0}`))
		},
		"get custom resource": func(int) { send(t, c, http.MethodGet, ships+"/known", "", nil) },
		"patch custom resource": func(i int) {
			send(t, c, http.MethodPatch, ships+"/known", string(types.MergePatchType), fmt.Appendf(nil, `{"metadata":{"labels":{"a":"%d"}}}`, i))
		},
		"create and delete custom resource": func(i int) {
			send(t, c, http.MethodPost, ships, runtime.ContentTypeJSON, shipBody(fmt.Sprintf("s%d", i)))
			send(t, c, http.MethodDelete, ships+fmt.Sprintf("/s%d", i), runtime.ContentTypeJSON, nil)
		},
		"patch ConfigMap": func(i int) {
			send(t, c, http.MethodPatch, root+"/configmaps/patched", string(types.MergePatchType), fmt.Appendf(nil, `{"data":{"other":"%d"}}`, i))
		},
	}
}

func shipBody(name string) []byte {
	return fmt.Appendf(nil, `{"apiVersion":"budget.example.com/v1","kind":"Ship","metadata":{"name":"%s"},"spec":{"crew":6}}`, name)
}

// defineShips makes a custom resource and waits until it is served at the path.
func defineShips(t testing.TB, c *cluster, path, group string) {
	t.Helper()
	definitions := crdclient.NewForConfigOrDie(restConfig(c)).ApiextensionsV1().CustomResourceDefinitions()
	_, err := definitions.Create(context.Background(), definition(group), metav1.CreateOptions{})
	require.NoError(t, err)
	require.Eventually(t, func() bool {
		return answerTo(c, http.MethodGet, path, "", runtime.ContentTypeJSON, "", nil).Code == http.StatusOK
	}, timeout, 5*time.Millisecond)
}

// budget is a line of budgetsFile.
type budget struct {
	name         string
	allocations  int
	instructions int // thousands; 0: not counted
}

func readBudgets(t *testing.T) (out []budget) {
	data, err := os.ReadFile(budgetsFile)
	require.NoError(t, err)
	for line := range strings.Lines(string(data)) {
		fields := strings.Split(strings.TrimSpace(line), "\t")
		b := budget{name: fields[0]}
		require.Contains(t, []int{2, 3}, len(fields), line)
		b.allocations, err = strconv.Atoi(fields[1])
		require.NoError(t, err)
		if len(fields) == 3 {
			b.instructions, err = strconv.Atoi(fields[2])
			require.NoError(t, err)
		}
		out = append(out, b)
	}
	return out
}

func TestBudgets(t *testing.T) {
	todo := operations(t, theCluster(t))
	for _, b := range readBudgets(t) {
		do := todo[b.name]
		require.NotNil(t, do, "no operation is called %q", b.name)
		delete(todo, b.name)
		t.Run(b.name, func(t *testing.T) {
			i := 0
			got := testing.AllocsPerRun(budgetRuns, func() { i++; do(i) })
			for try := 1; try < budgetTries && int(got) > b.allocations; try++ {
				got = min(got, testing.AllocsPerRun(budgetRuns, func() { i++; do(i) }))
			}
			t.Logf("%.0f of %d allocations", got, b.allocations)
			require.LessOrEqual(t, int(got), b.allocations, "allocations of an operation: make it cheaper, or its line in %s larger and say why", budgetsFile)
			require.Greater(t, int(got), b.allocations/2, "the budget is far too large: lower it in %s", budgetsFile)
		})
	}
	require.Empty(t, todo, "operations without a budget")
}

// steppedWord in the environment makes TestInstructions the child that is stepped through.
const steppedWord = "KNARR_STEPPED"

// steppedWarmUp is how often an operation is done before it is counted: caches are full then.
const steppedWarmUp = 20

// steppedTries is how often instructions are counted when an operation has too many: it is one run, in which a map may grow, or memory be asked for.
const steppedTries = 3

// TestInstructions counts instructions of operations in a process of their own.
func TestInstructions(t *testing.T) {
	if os.Getenv(steppedWord) != "" {
		stepThroughOperations(t)
		return
	}
	if testing.Short() {
		t.Skip("takes a minute on some machines")
	}
	budgets := slices.DeleteFunc(readBudgets(t), func(b budget) bool { return b.instructions == 0 })
	counts := countInstructions(t)
	for try := 1; try < steppedTries && slices.ContainsFunc(budgets, func(b budget) bool { return counts[b.name]/1000 > b.instructions }); try++ {
		for name, n := range countInstructions(t) {
			counts[name] = min(counts[name], n)
		}
	}
	for _, b := range budgets {
		got := counts[b.name] / 1000
		t.Logf("%s: %d of %d thousand instructions", b.name, got, b.instructions)
		assert.LessOrEqual(t, got, b.instructions, "%s, thousands of instructions: make it cheaper, or its line in %s larger and say why", b.name, budgetsFile)
		assert.Greater(t, got, b.instructions/2, "%s: the budget is far too large: lower it in %s", b.name, budgetsFile)
	}
}

// countInstructions gives the instructions of one run of each operation, by name.
func countInstructions(t *testing.T) map[string]int {
	cmd := exec.Command(os.Args[0], "-test.run", "^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), steppedWord+"=1")
	counts, err := rig.CountInstructions(cmd)
	if errors.Is(err, rig.ErrMayNotTrace) || errors.Is(err, rig.ErrTooSlow) {
		t.Skip(err)
	}
	require.NoError(t, err)
	return counts
}

func stepThroughOperations(t *testing.T) {
	c := startClusterOn(t, vfs.NewMem(), nil, func(*apiserver.Config) {}, false)
	todo := operations(t, c)
	s, err := rig.NewStepped(os.Stdin, os.Stdout)
	require.NoError(t, err)
	for _, b := range readBudgets(t) {
		if b.instructions == 0 {
			continue
		}
		for i := range steppedWarmUp {
			todo[b.name](-1 - i)
		}
		require.NoError(t, s.Count(b.name, func() { todo[b.name](0) }))
	}
	require.NoError(t, s.End())
}
