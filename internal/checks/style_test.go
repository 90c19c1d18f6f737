package checks

import (
	"bytes"
	"go/ast"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// Bounds of the code's shape.
const (
	maxFunctionLines = 100
	maxFileLines     = 900
)

// longReason is a comment in a function that gives the reason for its length.
const longReason = "//long:"

func TestEachPackageSaysOnceWhatItIsFor(t *testing.T) {
	docs := map[string][]string{}
	for _, f := range sources(t) {
		if f.test {
			continue
		}
		if f.ast.Doc != nil {
			docs[f.pkg] = append(docs[f.pkg], f.path)
		} else if docs[f.pkg] == nil {
			docs[f.pkg] = []string{}
		}
	}
	for pkg, files := range docs {
		if len(files) != 1 {
			t.Errorf("package %s has %d package comments, not one: %v", pkg, len(files), files)
		}
	}
}

func TestFunctionsAreShort(t *testing.T) {
	for _, f := range sources(t) {
		for _, d := range f.ast.Decls {
			fn, ok := d.(*ast.FuncDecl)
			if !ok || fn.Body == nil {
				continue
			}
			lines := f.fset.Position(fn.End()).Line - f.fset.Position(fn.Pos()).Line + 1
			if lines > maxFunctionLines && !f.hasComment(longReason, fn) {
				t.Errorf("%s: %s has %d lines: split it, or say why not in a comment %s reason", f.path, fn.Name.Name, lines, longReason)
			}
		}
	}
}

// hasComment says whether a comment that starts with prefix lies on or directly above fn, or in it.
func (f file) hasComment(prefix string, fn *ast.FuncDecl) bool {
	from := fn.Pos()
	if fn.Doc != nil {
		from = fn.Doc.Pos()
	}
	for _, group := range f.ast.Comments {
		for _, c := range group.List {
			if c.Pos() >= from && c.End() <= fn.End() && strings.HasPrefix(c.Text, prefix) && len(c.Text) > len(prefix)+5 {
				return true
			}
		}
	}
	return false
}

func TestFilesAreReadable(t *testing.T) {
	for _, f := range sources(t) {
		if lines := f.fset.Position(f.ast.End()).Line; lines > maxFileLines {
			t.Errorf("%s has %d lines: split it by concept (at most %d)", f.path, lines, maxFileLines)
		}
	}
}

// unfinished are words that a finished file does not hold.
var unfinished = regexp.MustCompile(`\b(TODO|FIXME|XXX)\b`)

func TestNothingIsLeftForLater(t *testing.T) {
	for _, f := range sources(t) {
		if strings.HasPrefix(f.path, "internal/checks/") {
			continue
		}
		for _, group := range f.ast.Comments {
			if m := unfinished.FindString(group.Text()); m != "" {
				t.Errorf("%s: %s", f.fset.Position(group.Pos()), m)
			}
		}
	}
}

func TestContextsComeFromOutside(t *testing.T) {
	for _, f := range sources(t) {
		ast.Inspect(f.ast, func(n ast.Node) bool {
			if s, ok := n.(*ast.SelectorExpr); ok && s.Sel.Name == "TODO" {
				if x, ok := s.X.(*ast.Ident); ok && x.Name == "context" {
					t.Errorf("%s: context.TODO", f.fset.Position(n.Pos()))
				}
			}
			return true
		})
	}
}

func TestKeysArePrivate(t *testing.T) {
	for _, f := range sources(t) {
		if f.test || f.pkg != "system/pki" {
			continue
		}
		ast.Inspect(f.ast, func(n ast.Node) bool {
			lit, ok := n.(*ast.BasicLit)
			if !ok || lit.Kind != token.INT || !strings.HasPrefix(lit.Value, "0o") {
				return true
			}
			if mode, err := strconv.ParseUint(lit.Value[2:], 8, 32); err == nil && mode&0o077 != 0 {
				t.Errorf("%s: mode %s lets others read keys", f.fset.Position(n.Pos()), lit.Value)
			}
			return true
		})
	}
}

// TestFoundationsAreThere: the files that a stranger looks for.
func TestFoundationsAreThere(t *testing.T) {
	for name, want := range map[string]string{"README.md": "make demo", "LICENSE": "Apache License", "Makefile": "conformance|bench", "docs/design.md": "store", ".ci/run": "make test"} {
		b, err := os.ReadFile(filepath.Join("../..", name))
		require.NoError(t, err)
		require.Regexp(t, want, string(bytes.TrimSpace(b)), name)
	}
}
