// Package apiserver is the HTTP pipeline of knarr's Kubernetes API: authentication, authorization, audit, admission, the verbs,
// discovery, OpenAPI, custom resources, aggregation and the proxies to nodes.
//
// Writes and subresources run through upstream's handlers and REST storage types over package api. It instantiates
// neither upstream's generic server nor its storage or caches.
//
// The path of a request: Handler (chain.go) -> deadlines and fairness (limits.go) -> authentication and authorization
// (auth.go) -> read (read.go) or route (route.go): health (health.go) and metrics (metrics.go), discovery, OpenAPI, an aggregated server, a custom resource, or a built-in group's handler (install.go).
// What upstream's server does in post-start hooks is in bootstrap.go, how a server ends in shutdown.go.
package apiserver
