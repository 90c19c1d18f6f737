// Package exchange moves a store between upstream's API server and knarr's, both real, on one real etcd.
package exchange
