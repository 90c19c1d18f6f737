package patching

import (
	"maps"
	"unicode/utf8"
)

// mergeTrees gives a tree with a JSON merge patch applied; trees that the patch does not touch are shared, none is changed. It gives false for
// a patch with nothing (null) in what it adds: the library takes some of these away.
// Source: mergeDocs in gopkg.in/evanphx/json-patch.v4/merge.go.
func mergeTrees(tree, patch map[string]any) (map[string]any, bool) {
	out := maps.Clone(tree)
	for key, value := range patch {
		if value == nil {
			delete(out, key)
			continue
		}
		if inner, ok := value.(map[string]any); ok {
			if old, ok := out[key].(map[string]any); ok {
				if value, ok = mergeTrees(old, inner); !ok {
					return nil, false
				}
				out[key] = value
				continue
			}
		}
		if holdsNothing(value) {
			return nil, false
		}
		out[key] = value
	}
	return out, true
}

// holdsNothing says whether there is a null somewhere in a tree.
func holdsNothing(tree any) bool {
	switch tree := tree.(type) {
	case nil:
		return true
	case []any:
		for _, item := range tree {
			if holdsNothing(item) {
				return true
			}
		}
	case map[string]any:
		for _, item := range tree {
			if holdsNothing(item) {
				return true
			}
		}
	}
	return false
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
