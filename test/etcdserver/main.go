// Command etcdserver runs one member of etcd on a loopback address for the tests of store/etcd. It prints its client URL once it
// answers, and ends when its standard input is closed, so it never outlives the test that started it.
package main

import (
	"flag"
	"fmt"
	"io"
	"net/url"
	"os"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
)

// maxTxnOps is more than etcd's default of 128, for benchmarks that fill a store.
const maxTxnOps = 4096

// startTimeout bounds the time to become ready.
const startTimeout = 30 * time.Second

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() error {
	dir := flag.String("data-dir", "", "directory of the data")
	listen := flag.String("listen", "127.0.0.1:0", "loopback address and port for clients")
	cert := flag.String("cert", "", "server certificate; with it clients must use TLS")
	key := flag.String("key", "", "key of the certificate")
	ca := flag.String("client-ca", "", "authority of client certificates, which are then required")
	name := flag.String("name", "default", "name of the member")
	peerListen := flag.String("peer", "127.0.0.1:0", "loopback address and port for other members")
	cluster := flag.String("cluster", "", "all members of a new cluster, as name=URL,...; empty: this one alone")
	noSync := flag.Bool("no-fsync", false, "do not wait for the disk")
	flag.Parse()

	cfg := embed.NewConfig()
	cfg.Dir = *dir
	cfg.LogLevel = "fatal"
	cfg.TickMs, cfg.ElectionMs = 20, 200
	cfg.MaxTxnOps = maxTxnOps
	cfg.UnsafeNoFsync = *noSync
	client := url.URL{Scheme: "http", Host: *listen}
	if *cert != "" {
		client.Scheme = "https"
		cfg.ClientTLSInfo.CertFile, cfg.ClientTLSInfo.KeyFile = *cert, *key
		cfg.ClientTLSInfo.TrustedCAFile, cfg.ClientTLSInfo.ClientCertAuth = *ca, *ca != ""
	}
	peer := url.URL{Scheme: "http", Host: *peerListen}
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	cfg.Name = *name
	if cfg.InitialCluster = *cluster; *cluster == "" {
		cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
	}

	e, err := embed.StartEtcd(cfg)
	if err != nil {
		return err
	}
	defer e.Close()
	select {
	case <-e.Server.ReadyNotify():
	case err := <-e.Err():
		return err
	case <-time.After(startTimeout):
		return fmt.Errorf("etcd was not ready after %s", startTimeout)
	}
	fmt.Printf("%s://%s\n", client.Scheme, e.Clients[0].Addr())
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}
