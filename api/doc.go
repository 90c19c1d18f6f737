// Package api says which kinds of objects exist and how they are kept.
//
// It joins two worlds. Above it stand upstream's REST storage types: one registry.Store per resource with its strategy,
// allocators and subresources, all of which speak storage.Interface and the internal ("hub") types. Below it stands our
// store, which keeps every object once, decoded, in the versioned type that in-process readers use. A Kind is the
// bridge for one resource; Storage is its storage.Interface.
//
// Ownership: an object inside a store.Record is shared and immutable. Whatever crosses the bridge towards a strategy,
// a handler, an admission plugin or a field manager is a private deep copy, and whatever crosses it towards the store is
// copied too, because conversion aliases memory and several upstream strategies write into their arguments.
package api
