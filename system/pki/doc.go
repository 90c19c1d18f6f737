// Package pki holds a cluster's keys and certificates and the way in for further nodes.
//
// A cluster has three authorities, because a certificate of one must not be taken for that of another: the server
// authority signs what listens (the API, the nodes' streaming API), the client authority signs who may call the API, the
// front-proxy authority signs the one client that may name other users in headers. Service-account tokens are signed by a
// key pair of their own. All keys are ECDSA P-256: making one takes tens of microseconds, so that a first start loses
// nothing to it.
//
// Each pair lies in one PEM file (certificate first, then key, mode 0600) which is replaced by a rename, so that a crash
// at any moment leaves either the old pair or the new one. What can be made again at any time (node and client
// certificates of the server process) is never written at all.
//
// Certificates are renewed while they are served, without a restart: a Source makes a new one when less than 30 % of
// the old one's life is left, at the next handshake that asks for it. Files that others read (the admin's kubeconfig) are
// renewed by Maintain, which sleeps until the next one is due.
//
// A further node joins with a token: the hash of the server authority plus a secret. The hash lets the node know the
// server before it says the secret; the secret lets the server trust the node. See JoinHandler and Join.
package pki
