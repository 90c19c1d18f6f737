// Package several runs several servers of one cluster on one real etcd, and kills them.
package several
