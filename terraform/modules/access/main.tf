# Who reaches what: security groups made from the table of traffic, the bastion, and the rights of nodes.
#
# Nodes with the same groups of the inventory are of one class, and a class has one security group: a node has one,
# however many services it runs, so that no limit of groups for an interface is met.

locals {
  class_of = { for node, groups in var.nodes : node => join("-", sort(groups)) }
  # What each class is called in the table.
  names   = { for class in distinct(values(local.class_of)) : class => concat(split("-", class), ["node"]) }
  members = merge(local.names, { bastion = ["bastion"] })

  # A line of the table for each sending and receiving class and each port.
  pairs = merge([
    for row in var.traffic : merge([
      for from, from_names in merge(local.members, { admin = ["admin"] }) : merge([
        for to, to_names in merge(local.members, { internet = ["internet"] }) : {
          for port in row.ports : "${from} to ${to} ${port}" => {
            from  = from
            to    = to
            first = tonumber(split("-", port)[0])
            last  = tonumber(reverse(split("-", port))[0])
            why   = row.why
          }
        } if contains(from_names, row.from) && contains(to_names, row.to)
      ]...)
    ]...)
  ]...)
  between  = { for key, pair in local.pairs : key => pair if pair.from != "admin" && pair.to != "internet" }
  outgoing = { for key, pair in local.pairs : key => pair if pair.to == "internet" }
  incoming = merge([
    for key, pair in local.pairs : { for cidr in var.admin_cidrs : "${key} ${cidr}" => merge(pair, { cidr = cidr }) }
    if pair.from == "admin"
  ]...)
}

resource "aws_security_group" "this" {
  #checkov:skip=CKV2_AWS_5:each is an instance's, which another module makes
  for_each    = local.members
  name        = "${var.name}-${each.key}"
  description = "Nodes that are ${each.key}"
  vpc_id      = var.vpc_id
  tags        = { Name = "${var.name}-${each.key}" }
}

resource "aws_vpc_security_group_ingress_rule" "between" {
  for_each                     = local.between
  security_group_id            = aws_security_group.this[each.value.to].id
  referenced_security_group_id = aws_security_group.this[each.value.from].id
  ip_protocol                  = "tcp"
  from_port                    = each.value.first
  to_port                      = each.value.last
  description                  = each.value.why
}

resource "aws_vpc_security_group_egress_rule" "between" {
  for_each                     = local.between
  security_group_id            = aws_security_group.this[each.value.from].id
  referenced_security_group_id = aws_security_group.this[each.value.to].id
  ip_protocol                  = "tcp"
  from_port                    = each.value.first
  to_port                      = each.value.last
  description                  = each.value.why
}

resource "aws_vpc_security_group_ingress_rule" "admin" {
  for_each          = local.incoming
  security_group_id = aws_security_group.this[each.value.to].id
  cidr_ipv4         = each.value.cidr
  ip_protocol       = "tcp"
  from_port         = each.value.first
  to_port           = each.value.last
  description       = each.value.why
}

resource "aws_vpc_security_group_egress_rule" "internet" {
  for_each          = local.outgoing
  security_group_id = aws_security_group.this[each.value.from].id
  cidr_ipv4         = "0.0.0.0/0"
  ip_protocol       = "tcp"
  from_port         = each.value.first
  to_port           = each.value.last
  description       = each.value.why
}

resource "aws_key_pair" "admin" {
  key_name   = var.name
  public_key = var.admin_public_key
}

# Debian's image has no agent of Session Manager and Debian no package of it: a bastion needs SSH alone.
resource "aws_instance" "bastion" {
  #checkov:skip=CKV_AWS_126:a machine that only passes connections on needs no measurement by the minute
  #checkov:skip=CKV2_AWS_41:it has no rights at all
  ami                    = var.bastion.ami_id
  instance_type          = var.bastion.type
  subnet_id              = var.public_subnet_id
  vpc_security_group_ids = [aws_security_group.this["bastion"].id]
  key_name               = aws_key_pair.admin.key_name
  ebs_optimized          = true
  tags                   = { Name = "${var.name}-bastion" }

  metadata_options {
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
  }

  root_block_device {
    volume_type = "gp3"
    volume_size = 8
    encrypted   = true
  }

  lifecycle {
    ignore_changes = [ami]
  }
}

# The same address after each start.
resource "aws_eip" "bastion" {
  domain   = "vpc"
  instance = aws_instance.bastion.id
  tags     = { Name = "${var.name}-bastion" }
}

data "aws_iam_policy_document" "assume" {
  statement {
    actions = ["sts:AssumeRole"]
    principals {
      type        = "Service"
      identifiers = ["ec2.amazonaws.com"]
    }
  }
}

# Not the versions of objects: what a node deletes or replaces can be had back.
data "aws_iam_policy_document" "lake" {
  statement {
    actions   = ["s3:GetBucketLocation", "s3:ListBucket", "s3:ListBucketMultipartUploads"]
    resources = [var.lake.bucket_arn]
  }
  statement {
    actions = [
      "s3:AbortMultipartUpload", "s3:DeleteObject", "s3:GetObject", "s3:ListMultipartUploadParts", "s3:PutObject",
    ]
    resources = ["${var.lake.bucket_arn}/*"]
  }
  statement {
    actions   = ["kms:Decrypt", "kms:GenerateDataKey"]
    resources = [var.lake.key_arn]
  }
}

resource "aws_iam_role" "lake" {
  name               = "${var.name}-lake"
  assume_role_policy = data.aws_iam_policy_document.assume.json
}

resource "aws_iam_role_policy" "lake" {
  name   = "lake"
  role   = aws_iam_role.lake.id
  policy = data.aws_iam_policy_document.lake.json
}

resource "aws_iam_instance_profile" "lake" {
  name = "${var.name}-lake"
  role = aws_iam_role.lake.name
}
