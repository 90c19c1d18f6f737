package service

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	mnl "github.com/mdlayher/netlink"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

const (
	groupNftables = 7 // NFNLGRP_NFTABLES: who changes what
	attrGenPID    = 2 // NFTA_GEN_PROC_PID
	genHeader     = 4 // bytes of struct nfgenmsg before the attributes
)

// watchForeign calls changed after each transaction of another process in the node's namespace, until ctx ends: it may have flushed the ruleset, as a
// restart of nftables.service does. The kernel sends one short message per transaction, which names the process; a filter keeps all other messages out.
func watchForeign(ctx context.Context, netNS int, changed func()) error {
	conn, err := mnl.Dial(unix.NETLINK_NETFILTER, &mnl.Config{NetNS: netNS, Groups: 1 << (groupNftables - 1)})
	if err != nil {
		return fmt.Errorf("services: watch the ruleset: %w", err)
	}
	const newGen = unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_NEWGEN
	filter, err := bpf.Assemble([]bpf.Instruction{
		bpf.LoadAbsolute{Off: 4, Size: 2}, // nlmsg_type; loads are big-endian, the header is in native order
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, newGen))), SkipFalse: 1},
		bpf.RetConstant{Val: 1 << 16},
		bpf.RetConstant{Val: 0},
	})
	if err == nil {
		err = conn.SetBPF(filter)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("services: watch the ruleset: %w", err), conn.Close())
	}
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	for {
		msgs, err := conn.Receive()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil && !errors.Is(err, unix.ENOBUFS) {
			return errors.Join(fmt.Errorf("services: watch the ruleset: %w", err), conn.Close())
		}
		if err != nil || foreign(msgs) { // a full buffer has lost messages: look
			changed()
		}
	}
}

// foreign says whether one of the messages is of another process.
func foreign(msgs []mnl.Message) bool {
	for _, m := range msgs {
		if len(m.Data) < genHeader {
			continue
		}
		ad, err := mnl.NewAttributeDecoder(m.Data[genHeader:])
		if err != nil {
			continue
		}
		ad.ByteOrder = binary.BigEndian
		for ad.Next() {
			if ad.Type() == attrGenPID && !isOurThread(ad.Uint32()) {
				return true
			}
		}
	}
	return false
}

// isOurThread says whether a thread of this process has the id: the kernel names the thread that sent a transaction.
func isOurThread(id uint32) bool {
	_, err := os.Stat(fmt.Sprintf("/proc/self/task/%d", id))
	return err == nil
}
