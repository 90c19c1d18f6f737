// Package ownership keeps the managed fields of objects that are created, updated and patched: who owns which field.
//
// The results are those of upstream's field manager, k8s.io/apimachinery/pkg/util/managedfields over
// sigs.k8s.io/structured-merge-diff, byte for byte; a test compares both over generated objects. It works on Go structs and
// on the stored JSON of the sets directly, where upstream builds typed values and sets of path elements: two or three dozen
// allocations instead of two thousand. What it does not know (managers of another version, sets that are not in canonical
// form, duplicate list items, more managers than are kept) it refuses, and the caller asks upstream's. Server-side apply is
// always upstream's.
package ownership
