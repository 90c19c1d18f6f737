package checks

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// mayImport is the import table: a part (a folder, or a folder of a folder where that has a line of its own) and the parts
// of ours that its packages may import, besides their own. "all" is for what wires. An arrow that is not here is a
// decision: change this table, and docs/design.md where it tells of it.
var mayImport = map[string]string{
	"store":             "",
	"api":               "store",
	"apiserver":         "api store",
	"apiserver/options": "",
	"client":            "store",
	"control":           "client",
	"scheduler":         "client",
	"network":           "client",
	"node":              "client",
	"node/agent":        "client node/cgroup node/objects node/podspec node/probe node/server node/stats node/status node/streaming node/sweep node/volume",
	"node/imageapi":     "node/image",
	"node/runtime":      "node/shim node/image node/cgroup node/sweep",
	"node/shim":         "internal/pidlock",
	"cmd/knarr":         "cli system",
	"cmd/knarr-shim":    "node/shim",
	"cli":               "apiserver/options internal/pidlock network node/image node/imageapi node/shim system/pki",
	"system/pki":        "",
	"system":            "all",
	"internal":          "",
	"internal/pidlock":  "",
	"internal/rig":      "internal/sysmon network/netns",
	"bench":             "internal",
	"examples":          "internal",
	"test":              "internal",
	"hollow":            "client node network",
}

// never are packages of others that no package of ours imports: the parts of Kubernetes that knarr replaces.
var never = []string{
	"k8s.io/apiserver/pkg/storage/etcd3",
	"k8s.io/apiserver/pkg/storage/cacher",
	"k8s.io/kubernetes/pkg/kubelet",
	"k8s.io/kubernetes/cmd/kubelet",
	"k8s.io/kubernetes/cmd/kube-proxy",
	"k8s.io/kubernetes/cmd/kube-apiserver",
	"k8s.io/kubernetes/pkg/kubelet/pleg",
	"k8s.io/kubernetes/pkg/kubelet/volumemanager",
	"k8s.io/kubernetes/pkg/proxy/iptables",
	"k8s.io/kubernetes/pkg/proxy/ipvs",
	"k8s.io/kubernetes/pkg/proxy/nftables",
}

// shimNever keeps the one process that parents every container small.
var shimNever = []string{"k8s.io/", "sigs.k8s.io/", "google.golang.org/grpc"}

// file is one parsed source file of the project.
type file struct {
	path string // from the project's top, with slashes
	pkg  string // its folder
	test bool
	ast  *ast.File
	fset *token.FileSet
}

// sources parses every Go file of the project.
func sources(t *testing.T) []file {
	t.Helper()
	top, err := filepath.Abs("../..")
	require.NoError(t, err)
	var out []file
	fset := token.NewFileSet()
	require.NoError(t, filepath.WalkDir(top, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel := strings.TrimPrefix(strings.TrimPrefix(p, top), "/")
		if d.IsDir() {
			if d.Name() == "testdata" || rel == "bin" || strings.HasPrefix(d.Name(), ".") && rel != "" {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(rel, ".go") {
			return nil
		}
		f, err := parser.ParseFile(fset, p, nil, parser.ParseComments)
		if err != nil {
			return err
		}
		out = append(out, file{path: rel, pkg: path.Dir(rel), test: strings.HasSuffix(rel, "_test.go"), ast: f, fset: fset})
		return nil
	}))
	require.NotEmpty(t, out)
	return out
}

// part is the longest line of the table that pkg belongs to.
func part(pkg string) string {
	for p := pkg; p != "."; p = path.Dir(p) {
		if _, ok := mayImport[p]; ok {
			return p
		}
	}
	return ""
}

func (f file) imports() []string {
	var out []string
	for _, i := range f.ast.Imports {
		if p, err := strconv.Unquote(i.Path.Value); err == nil {
			out = append(out, p)
		}
	}
	return out
}

func TestImportTable(t *testing.T) {
	for _, f := range sources(t) {
		from := part(f.pkg)
		if from == "" {
			t.Errorf("%s is in a folder that the import table does not know", f.path)
			continue
		}
		for _, i := range f.imports() {
			if ours, ok := strings.CutPrefix(i, "knarr/"); ok && !f.test && !allowed(from, f.pkg, ours) {
				t.Errorf("%s imports %s: %s may import only: %s", f.path, ours, from, mayImport[from])
			}
			if slices.Contains(never, i) && !strings.HasPrefix(f.pkg, "bench") {
				t.Errorf("%s imports %s: knarr has its own", f.path, i)
			}
		}
	}
}

// allowed says whether a package may import another. Each part may import itself.
func allowed(from, pkg, to string) bool {
	if mayImport[from] == "all" {
		return true
	}
	targets := append(strings.Fields(mayImport[from]), from)
	return slices.ContainsFunc(targets, func(a string) bool { return to == a || strings.HasPrefix(to, a+"/") })
}

func TestShimStaysSmall(t *testing.T) {
	for _, f := range sources(t) {
		if !strings.HasPrefix(f.pkg, "cmd/knarr-shim") && !strings.HasPrefix(f.pkg, "node/shim") {
			continue
		}
		for _, i := range f.imports() {
			for _, prefix := range shimNever {
				if strings.HasPrefix(i, prefix) && !f.test {
					t.Errorf("%s imports %s: the shim must stay small", f.path, i)
				}
			}
		}
	}
}

// genericServer is the package whose types our code may name (upstream's storage providers take them) and whose server it
// must never build.
const genericServer = "k8s.io/apiserver/pkg/server"

func TestGenericServerIsNeverBuilt(t *testing.T) {
	for _, f := range sources(t) {
		if f.test {
			continue
		}
		name := importName(f.ast, genericServer)
		if name == "" {
			continue
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			if s, ok := n.(*ast.SelectorExpr); ok {
				if x, ok := s.X.(*ast.Ident); ok && x.Name == name && slices.Contains([]string{"NewConfig", "NewRecommendedConfig", "New", "GenericAPIServer"}, s.Sel.Name) {
					t.Errorf("%s uses %s.%s: knarr has its own server", f.fset.Position(n.Pos()), name, s.Sel.Name)
				}
			}
			return true
		})
	}
}

// importName is how a file calls an imported package, or nothing.
func importName(f *ast.File, path string) string {
	for _, i := range f.Imports {
		if i.Path.Value == strconv.Quote(path) {
			if i.Name != nil {
				return i.Name.Name
			}
			return path[strings.LastIndexByte(path, '/')+1:]
		}
	}
	return ""
}

// TestProgramsOfTheHostAreNotExecuted: knarr works without any tool of the machine. Running itself, the shim or the go
// command (image build) is for the packages that are named here.
func TestProgramsOfTheHostAreNotExecuted(t *testing.T) {
	allowed := []string{"cli", "node/shim", "node/image", "node/runtime", "network/netns", "store/storetest", "bench", "examples", "test", "internal"}
	for _, f := range sources(t) {
		if f.test || !slices.Contains(f.imports(), "os/exec") {
			continue
		}
		if !slices.ContainsFunc(allowed, func(a string) bool { return f.pkg == a || strings.HasPrefix(f.pkg, a+"/") }) {
			t.Errorf("%s imports os/exec: no program of the host may be executed", f.path)
		}
	}
}

func TestTableNamesFoldersThatCanBe(t *testing.T) {
	for from, to := range mayImport {
		for _, target := range strings.Fields(to) {
			if target != "all" && part(target) == "" {
				t.Errorf("the table lets %s import %s, which it does not know itself", from, target)
			}
		}
	}
	_, err := os.Stat("../../go.mod")
	require.NoError(t, err)
}
