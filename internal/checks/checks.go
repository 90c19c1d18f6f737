// Package checks holds the project to its own rules: who may import whom, how long functions and files get, that each
// package says what it is for. Its tests read the source and are part of `make check` and `make test`.
package checks
