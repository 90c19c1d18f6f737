// Package clients runs programs that nobody here wrote against a cluster of knarr: Helm, Kustomize, the examples of client-go,
// the integration tests of controller-runtime, and operators, each built from its Go module as it is, and each with a script
// in testdata that says what it is told and what must come of it. docs/clients.md tells what was run.
//
// It is a Go module of its own: the product must not depend on what these programs need. `make clients` runs it.
package clients
