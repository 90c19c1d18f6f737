package patching

import (
	"maps"
	"math"
	"unicode/utf8"

	kjson "sigs.k8s.io/json"
)

// MergeTree gives a JSON tree with a JSON merge patch applied. It shares with obj, which is not changed, all that the patch does not touch; the maps on
// the way to what it touches, and obj's metadata, are copies. It gives false for a patch that upstream's handler has to deal with.
func MergeTree(obj map[string]any, patch []byte) (map[string]any, bool) {
	tree := map[string]any{}
	if strict, err := kjson.UnmarshalStrict(patch, &tree); err != nil || len(strict) > 0 || tree == nil || !whole(tree) {
		return nil, false
	}
	out := mergeTrees(obj, tree)
	if m, ok := out["metadata"].(map[string]any); ok && tree["metadata"] == nil {
		out["metadata"] = maps.Clone(m)
	}
	return out, true
}

// mergeTrees gives a tree with a JSON merge patch applied; trees that the patch does not touch are shared. obj is not changed, patch is taken over.
// Source: mergeDocs in gopkg.in/evanphx/json-patch.v4/merge.go.
func mergeTrees(obj, patch map[string]any) map[string]any {
	out := maps.Clone(obj)
	if out == nil {
		out = map[string]any{}
	}
	for name, v := range patch {
		if v == nil {
			delete(out, name)
			continue
		}
		was, inner := out[name], v
		wasTree, isTree := was.(map[string]any)
		patchTree, patchIsTree := v.(map[string]any)
		switch {
		case was == nil || !isTree:
			dropNulls(inner)
		case patchIsTree:
			inner = mergeTrees(wasTree, patchTree)
		}
		out[name] = inner
	}
	return out
}

// dropNulls removes fields that are null; elements of lists stay.
func dropNulls(v any) {
	switch v := v.(type) {
	case map[string]any:
		for name, field := range v {
			if field == nil {
				delete(v, name)
				continue
			}
			dropNulls(field)
		}
	case []any:
		for _, e := range v {
			dropNulls(e)
		}
	}
}

// whole says that all numbers of a tree are as reading its JSON gives them: those without a fraction are integers.
func whole(v any) bool {
	switch v := v.(type) {
	case float64:
		return v != math.Trunc(v)
	case map[string]any:
		for _, field := range v {
			if !whole(field) {
				return false
			}
		}
	case []any:
		for _, e := range v {
			if !whole(e) {
				return false
			}
		}
	}
	return true
}

// isText says whether all strings of a tree are as they would come back from JSON, which has no other bytes than those of text.
func isText(tree any) bool {
	switch tree := tree.(type) {
	case string:
		return utf8.ValidString(tree)
	case []any:
		for _, item := range tree {
			if !isText(item) {
				return false
			}
		}
	case map[string]any:
		for key, item := range tree {
			if !utf8.ValidString(key) || !isText(item) {
				return false
			}
		}
	}
	return true
}
